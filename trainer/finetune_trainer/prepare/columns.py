"""Which column holds what: as configured, else under the usual names. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.report import FailureClass
from finetune_api.spec import Columns
from finetune_api.structure import near_match
from finetune_api.traits import USUAL_COLUMNS, Task
from finetune_trainer.data.answers import Found
from finetune_trainer.failures import TrainerError

MADE_BY_TEMPLATE = ("text", "question", "document", "prompt")
"""What a `template` makes out of other columns, so that its own column need not exist."""

SPREAD_CHOICES: tuple[tuple[str, ...], ...] = (
    ("sol1", "sol2"),
    ("answerA", "answerB", "answerC"),
    ("choice1", "choice2"),
    ("ending0", "ending1", "ending2", "ending3"),
    ("answer0", "answer1", "answer2", "answer3"),
    ("opa", "opb", "opc", "opd"),
    ("option_a", "option_b", "option_c", "option_d"),
    ("option1", "option2", "option3", "option4"),
    ("option1", "option2"),
    ("A", "B", "C", "D", "E"),
    ("A", "B", "C", "D"),
)
"""Columns that hold one choice each; more before fewer."""

PAIRS: tuple[tuple[str, ...], ...] = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_A", "sentence_B"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
"""Columns that hold the two texts of a pair, whose relation the label says."""
PREFERENCE = ("chosen", "rejected")
NAMED = 8
"""Columns that a note names."""

PROMPT_AND_COMPLETION = ("prompt", "completion")
"""Columns that hold a chat in two parts."""


def find_columns(
    task: Task, configured: Columns, present: Sequence[str], *, templated: bool, where: str, field: str
) -> Found:
    """Role to column, or to several where each holds one choice or one text of a pair. `where` names the dataset.

    Raises TrainerError (bad-data) naming the columns there are.
    """
    found: dict[str, str | tuple[str, ...]] = {}
    taken: set[str] = set(filter(None, configured.model_dump().values()))
    for role in task.traits.columns:
        given: str | None = getattr(configured, role)
        if given:
            column: str | tuple[str, ...] | None = _configured(role, given, present, where, field)
        elif role == "text" and task.traits.has_labels and not templated and "text" not in present:
            column = _spread(PAIRS, present, taken) or _usual(role, present, taken)
        else:
            column = _usual(role, present, taken)
        if column is not None:
            found[role] = column
            taken.update([column] if isinstance(column, str) else column)
        elif role not in task.traits.optional_columns and not (templated and role in MADE_BY_TEMPLATE):
            raise TrainerError(FailureClass.BAD_DATA, _missing(task, role, present, where), f"{field}.columns.{role}")
    return found


def _missing(task: Task, role: str, present: Sequence[str], where: str) -> str:
    if set(PREFERENCE) <= set(present):
        return (
            f"{where} holds preference pairs (columns {' and '.join(PREFERENCE)}): they need a task for preferences, "
            f"which is not supported yet. To learn the preferred answers only, set columns.{role}: {PREFERENCE[0]}."
        )
    return (
        f"{where} has no column with a usual name for {role} ({', '.join(USUAL_COLUMNS[role][:4])}, …): "
        f"set columns.{role} to one of its columns: {', '.join(present)}.{_other_task(task, present)}"
    )


def _other_task(task: Task, present: Sequence[str]) -> str:
    """Where only the row's task is misnamed: that prompts with completions are instructions."""
    for other in Task:
        needed = [role for role in other.traits.columns if role not in other.traits.optional_columns]
        found = [_usual(role, present, set()) for role in needed]
        if other is not task and len(needed) > 1 and all(found) and len(set(found)) == len(found):
            return f" Its columns fit task {other}."
    return ""


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
    if role == "messages":
        return _spread((PROMPT_AND_COMPLETION,), present, taken)
    return _spread(SPREAD_CHOICES, present, taken) if role == "choices" else None


def _spread(known: Sequence[tuple[str, ...]], present: Sequence[str], taken: set[str]) -> tuple[str, ...] | None:
    return next((names for names in known if set(names) <= set(present) - taken), None)


def column_notes(found: Found, configured: Columns, present: Sequence[str], used: Sequence[str]) -> list[str]:
    """Which columns were chosen and which are not used, in sentences. used: those used otherwise, as for `groupBy`."""
    of_role = {role: [column] if isinstance(column, str) else list(column) for role, column in found.items()}
    chosen = [
        f"{role} is {' + '.join(names)}"
        for role, names in of_role.items()
        if names != [role] and not getattr(configured, role)
    ]
    taken = {name for names in of_role.values() for name in names} | set(used)
    unused = [name for name in present if name not in taken]
    more = ", …" if len(unused) > NAMED else ""
    notes = [f"columns found by their names: {', '.join(chosen)}"] if chosen else []
    if "completion" in found and "label" in unused:
        notes.append("completions with a false label are learnt like others: to leave them out, set filter: label")
    return notes + ([f"columns that are not used: {', '.join(unused[:NAMED])}{more}"] if unused else [])
