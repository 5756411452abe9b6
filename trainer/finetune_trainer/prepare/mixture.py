"""Who learns, who is held out, over all datasets of the job: the sides of every row, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from finetune_api.report import FailureClass
from finetune_api.spec import Split
from finetune_trainer.data.templates import near_match
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.near_duplicates import METHOD, joined, keep_together
from finetune_trainer.prepare.scan import Reading, Scan
from finetune_trainer.prepare.split import Side, assign, draw

EvaluationSplit = Literal["test", "validation", "unseen half of validation", "none"]
UNSEEN_HALF: EvaluationSplit = "unseen half of validation"
Value = TypeVar("Value")


@dataclass
class Division:
    """The sides of the rows of one dataset.

    `sides[split][i]` is the side of the i-th usable row of that split: train, validation (during training), test
    (what Evaluate scores) or left out. Where evaluation is on `validation`, rows of that side are scored too.
    """

    reading: Reading
    scans: dict[str, Scan]
    sides: dict[str, list[Side]]
    evaluation: EvaluationSplit
    labels: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scored: set[tuple[str, int]] | None = None
    """(split, row number) of the rows that Evaluate scores, where `evaluation.maxRows` draws some; else all."""

    def count(self, side: Side) -> int:
        """Rows on that side."""
        return sum(sides.count(side) for sides in self.sides.values())

    @property
    def scored_side(self) -> Side:
        """The side that Evaluate scores."""
        return "validation" if self.evaluation == "validation" else "test"


def divide(
    readings: Sequence[tuple[Reading, dict[str, Scan]]], split: Split, *, selects: bool, max_rows: int | None
) -> list[Division]:
    """The division of every dataset. selects: training picks a checkpoint by validation; max_rows: scored at most.

    Raises TrainerError (bad-data): a held-out label that never occurs in training, nothing left to train on.
    """
    divisions = []
    for reading, scans in readings:
        division = _divide(reading, scans, split, selects)
        _check_labels(division)
        if not division.count("train"):
            raise TrainerError(FailureClass.BAD_DATA, f"Nothing of {reading.name} is left to train on.", reading.field)
        if max_rows is not None:
            division.scored = _draw_scored(division, max_rows)
        divisions.append(division)
    _say_contamination(divisions)
    return divisions


def _divide(reading: Reading, scans: dict[str, Scan], split: Split, selects: bool) -> Division:
    spec, own = reading.spec, reading.spec.splits
    train = scans[own.train]
    strata = train.labels if split.stratify else [""] * len(train)
    chosen: Sequence[int] = range(len(train))
    if spec.max_rows is not None:
        chosen = [i for i, taken in enumerate(draw(train.ranks, strata, spec.max_rows)) if taken]
    together, large = _together(train, chosen)
    shares: dict[Side, float] = {}
    if own.test is None and split.test > 0:
        shares["test"] = split.test
    if own.validation is None and split.validation > 0:
        shares["validation"] = split.validation
    sides: list[Side] = ["left out"] * len(train)
    assigned = assign(_of(train.ranks, chosen), _of(strata, chosen), together, shares)
    for i, side in zip(chosen, assigned, strict=True):
        sides[i] = side
    division = Division(reading, scans, {own.train: sides}, "none", ())
    if reading.task.traits.has_labels:
        trained = {label for label, side in zip(train.labels, sides, strict=True) if side == "train"}
        division.labels = tuple(sorted(trained))
    if own.validation is not None:
        division.sides[own.validation] = ["validation"] * len(scans[own.validation])
    if own.test is not None:
        division.sides[own.test] = ["test"] * len(scans[own.test])
    division.evaluation = _evaluation_split(division, selects)
    if division.evaluation == UNSEEN_HALF:
        where = own.validation or own.train
        _halve(division.sides[where], scans[where], split)
    _exclude_held_out(division)
    _say_duplicates(division, train, large, bool(shares))
    return division


def _of(values: Sequence[Value], chosen: Sequence[int]) -> Sequence[Value]:
    """The values of the chosen rows: as they are where that is all of them, for there may be millions."""
    return values if len(chosen) == len(values) else [values[i] for i in chosen]


def _together(scan: Scan, chosen: Sequence[int]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """(what goes together among the chosen rows, sizes of the clusters too large for that)."""
    together, large = keep_together(scan.cluster[np.asarray(chosen, np.int64)])
    return (joined(together, _of(scan.groups, chosen)) if scan.groups else together), large


def _evaluation_split(division: Division, selects: bool) -> EvaluationSplit:
    if division.count("test"):
        return "test"
    if not division.count("validation"):
        return "none"
    return UNSEEN_HALF if selects else "validation"


def _halve(sides: list[Side], scan: Scan, split: Split) -> None:
    """Move half of the validation rows to `test`: a checkpoint chosen on rows is no longer measured by them."""
    held = [i for i, side in enumerate(sides) if side == "validation"]
    strata = [scan.labels[i] if split.stratify else "" for i in held]
    together, _ = _together(scan, held)
    halves = assign([scan.ranks[i] for i in held], strata, together, {"test": 0.5})
    for i, side in zip(held, halves, strict=True):
        sides[i] = "test" if side == "test" else "validation"


def _exclude_held_out(division: Division) -> None:
    """Keep rows that `maxRows` left out from a baseline where they repeat a held-out row."""
    held = {
        int(division.scans[split].cluster[i])
        for split, sides in division.sides.items()
        for i, side in enumerate(sides)
        if side in ("validation", "test")
    }
    train = division.reading.spec.splits.train
    own, sides = division.scans[train].cluster, division.sides[train]
    for i, side in enumerate(sides):
        if side == "left out" and int(own[i]) in held:
            sides[i] = "excluded"


def _check_labels(division: Division) -> None:
    if not division.reading.task.traits.has_labels:
        return
    name, known = division.reading.name, set(division.labels)
    for split, sides in division.sides.items():
        scan = division.scans[split]
        for row, label, side in zip(scan.rows, scan.labels, sides, strict=True):
            if side in ("validation", "test") and label not in known:
                lost = " maxRows may have drawn none: raise it." if division.reading.spec.max_rows else ""
                raise TrainerError(
                    FailureClass.BAD_DATA,
                    f"Label {label!r} of {name} ({split}, row {row}) is held out but never occurs in training."
                    f"{near_match(label, list(known))}{lost}",
                    f"{division.reading.field}.columns.label",
                )
    if len(known) < 2:
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"{name} has one label only ({next(iter(known), '')!r}): there is nothing to tell apart.",
            f"{division.reading.field}.columns.label",
        )


def _draw_scored(division: Division, max_rows: int) -> set[tuple[str, int]]:
    held = [
        (scan.ranks[i], scan.labels[i], (split, scan.rows[i]))
        for split, sides in division.sides.items()
        for scan in [division.scans[split]]
        for i, side in enumerate(sides)
        if side == division.scored_side
    ]
    drawn = draw([rank for rank, _, _ in held], [label for _, label, _ in held], max_rows)
    return {key for (_, _, key), taken in zip(held, drawn, strict=True) if taken}


def _say_duplicates(division: Division, train: Scan, large: list[int], cut: bool) -> None:
    duplicates = len(train) - len(np.unique(train.cluster))
    if duplicates:
        kept = ", kept on one side of the split" if cut else ""
        division.notes.append(f"{duplicates} rows are near-duplicates of others{kept} ({METHOD})")
    if large:
        division.warnings.append(
            f"{division.reading.name}: {len(large)} clusters of near-duplicates have more than 1% of the rows (the "
            f"largest {large[0]}) and were divided like other rows; held-out scores may be too good"
        )


def _say_contamination(divisions: Sequence[Division]) -> None:
    """Held-out rows that occur, nearly word for word, among the training rows of any dataset of the job."""

    def of(division: Division, *wanted: Side) -> npt.NDArray[np.int64]:
        parts = [
            division.scans[split].cluster[np.fromiter((side in wanted for side in sides), bool, len(sides))]
            for split, sides in division.sides.items()
        ]
        return np.concatenate(parts)

    trained = [(division.reading.name, of(division, "train")) for division in divisions]
    for division in divisions:
        held, met = of(division, "validation", "test"), False
        for name, train in trained:
            count = int(np.isin(held, train).sum())
            if count:
                met = True
                division.warnings.append(
                    f"{count} of {len(held)} held-out rows of {division.reading.name} occur, nearly word for word, "
                    f"among the training rows of {name}"
                )
        if not met:
            division.notes.append("no held-out row occurs among the training rows of any dataset")
