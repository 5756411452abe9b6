"""How many rows are held out and measured, and whether the gate can decide on them: one rule for plan and Prepare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from finetune_api.spec import USUAL_VALIDATION, Dataset, FineTuneJobSpec

LEAST_ROWS = 30
"""Fewer measured rows than this in any dataset: bootstrap intervals are too narrow to be believed."""
LARGEST_SHARE = 0.5
STEPS = tuple(step / 20 for step in range(1, 13))
"""Shares that are tried as advice."""


def selects_checkpoint(spec: FineTuneJobSpec) -> bool:
    """Whether training chooses by validation, so that those rows can no longer measure."""
    return spec.training.keep_best or spec.training.early_stopping is not None


@dataclass(frozen=True)
class Shares:
    """Which parts of a dataset's training split are cut off."""

    validation: float
    test: float


def held_out_shares(spec: FineTuneJobSpec, dataset: Dataset, rows: int) -> Shares:
    """The shares of `rows` rows that are held out.

    Without `split.validation`, a fifth is for validation. Where these rows also measure, a small dataset holds out
    more, up to half, if `LEAST_ROWS` can then be measured: half of them where a checkpoint is selected on the others.
    """
    split, own = spec.split, dataset.splits
    test = split.test if own.test is None else 0.0
    if own.validation is not None:
        return Shares(0.0, test)
    if split.validation is not None:
        return Shares(split.validation, test)
    needed = LEAST_ROWS * (2 if selects_checkpoint(spec) else 1)
    raised = own.test is None and not test and needed <= LARGEST_SHARE * rows
    return Shares(max(USUAL_VALIDATION, needed / rows) if raised else USUAL_VALIDATION, test)


def measured_rows(spec: FineTuneJobSpec, dataset: Dataset, rows: int) -> int | None:
    """About how many of `rows` rows are measured; None where splits of the dataset's own decide that."""
    own = dataset.splits
    if own.test is not None or own.validation is not None:
        return None
    shares = held_out_shares(spec, dataset, rows)
    measured = round(rows * (shares.test or shares.validation / (2 if selects_checkpoint(spec) else 1)))
    return min(measured, spec.evaluation.max_rows or measured)


def too_few(measured: Mapping[str, int]) -> dict[str, int]:
    """The datasets whose rows decide nothing; all of them where none has rows. Those without rows are not measured."""
    return {name: rows for name, rows in measured.items() if rows < LEAST_ROWS and (rows or not any(measured.values()))}


def undecidable(
    spec: FineTuneJobSpec, measured: Mapping[str, int], measured_with: Callable[[FineTuneJobSpec], Mapping[str, int]]
) -> str:
    """Why the gate cannot be decided on that many rows of each dataset, and what to change; empty where it can.

    measured_with: the rows of each dataset that another spec would measure. Advice has been tried with it.
    """
    unmeasured = [key for key in spec.evaluation.gate.minimum if measured.get(key.partition("/")[0]) == 0]
    few = too_few(measured) if spec.evaluation.gate.must_improve else {}
    if not few and not unmeasured:
        return ""
    wanted = [*few, *(key.partition("/")[0] for key in unmeasured)]
    least = LEAST_ROWS if few else 1
    advice = next(
        (
            change
            for change, changed in _changes(spec, least)
            if all(measured_with(changed).get(name, 0) >= least for name in wanted)
        ),
        "use more rows, or a dataset with a test split of its own (datasets[].splits.test)",
    )
    if not few:
        return (
            f"The gate cannot be decided: no rows are held out for {', '.join(unmeasured)} of evaluation.gate.minimum. "
            f"To measure them, {advice}; or remove the minimum."
        )
    named = ", ".join(f"{rows:,} of {name}" for name, rows in few.items())
    return (
        f"The gate cannot be decided: {named} would be measured, and mustImprove needs at least {LEAST_ROWS} rows of "
        f"each dataset. To measure enough, {advice}; or set evaluation.gate.mustImprove: false."
    )


def _changes(spec: FineTuneJobSpec, least: int) -> Iterator[tuple[str, FineTuneJobSpec]]:
    """Changes that measure more rows, the gentlest first, in words and as a spec."""
    words: list[str] = []
    if spec.evaluation.max_rows is not None and spec.evaluation.max_rows < least:
        words = [f"raise evaluation.maxRows to {least}"]
        spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"max_rows": least})})
        yield words[0], spec
    validation = 0.1 if selects_checkpoint(spec) else 0.0
    for share in STEPS:
        split = spec.split.model_copy(update={"validation": validation, "test": share})
        change = f"set split: {{validation: {validation:g}, test: {share:g}}}"
        yield " and ".join([*words, change]), spec.model_copy(update={"split": split})
