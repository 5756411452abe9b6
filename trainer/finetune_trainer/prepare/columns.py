"""Which column holds what: as configured, else under the usual names. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.report import FailureClass
from finetune_api.spec import Columns
from finetune_api.structure import near_match
from finetune_api.traits import USUAL_COLUMNS, Task
from finetune_trainer.failures import TrainerError

MADE_BY_TEMPLATE = ("text", "question", "document")
"""What a `template` makes out of other columns, so that its own column need not exist."""

SPREAD_CHOICES: tuple[tuple[str, ...], ...] = (
    ("sol1", "sol2"),
    ("answerA", "answerB", "answerC"),
    ("option1", "option2"),
    ("choice1", "choice2"),
    ("ending0", "ending1", "ending2", "ending3"),
    ("A", "B", "C", "D", "E"),
    ("A", "B", "C", "D"),
)
"""Columns that hold one choice each."""


def find_columns(
    task: Task, configured: Columns, present: Sequence[str], *, templated: bool, where: str, field: str
) -> dict[str, str | tuple[str, ...]]:
    """Role to column (several columns where each holds one choice). `where` names the dataset for the sentence.

    Raises TrainerError (bad-data) naming the columns there are.
    """
    found: dict[str, str | tuple[str, ...]] = {}
    taken: set[str] = set(filter(None, configured.model_dump().values()))
    for role in task.traits.columns:
        given: str | None = getattr(configured, role)
        column = _configured(role, given, present, where, field) if given else _usual(role, present, taken)
        if column is not None:
            found[role] = column
            taken.update([column] if isinstance(column, str) else column)
        elif role not in task.traits.optional_columns and not (templated and role in MADE_BY_TEMPLATE):
            usual = ", ".join(USUAL_COLUMNS[role][:4])
            raise TrainerError(
                FailureClass.BAD_DATA,
                f"{where} has no column with a usual name for {role} ({usual}, …): set columns.{role} "
                f"to one of its columns: {', '.join(present)}.",
                f"{field}.columns.{role}",
            )
    return found


def _configured(role: str, given: str, present: Sequence[str], where: str, field: str) -> str:
    if given in present:
        return given
    raise TrainerError(
        FailureClass.BAD_DATA,
        f"{where} has no column {given!r}.{near_match(given, list(present))} Its columns: {', '.join(present)}.",
        f"{field}.columns.{role}",
    )


def _usual(role: str, present: Sequence[str], taken: set[str]) -> str | tuple[str, ...] | None:
    by_lower = {name.lower(): name for name in reversed(present) if name not in taken}
    for name in USUAL_COLUMNS[role]:
        if name.lower() in by_lower:
            return by_lower[name.lower()]
    if role == "choices":
        return next((names for names in SPREAD_CHOICES if set(names) <= set(present)), None)
    return None
