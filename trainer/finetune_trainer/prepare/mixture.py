"""Which rows are trained on and which are held out, over all datasets of the job, with notes and warnings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from finetune_api.holdout import LEAST_ROWS, held_out_shares, selects_checkpoint
from finetune_api.report import FailureClass
from finetune_api.spec import USUAL_VALIDATION, FineTuneJobSpec, Split
from finetune_api.structure import near_match
from finetune_trainer.data.words import fold
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.near_duplicates import METHOD, joined, keep_together
from finetune_trainer.prepare.scan import DatasetReader, Scan
from finetune_trainer.prepare.split import SplitName, assign, draw

EvaluationSplit = Literal["test", "validation", "unseen half of validation", "none"]
UNSEEN_HALF: EvaluationSplit = "unseen half of validation"
Value = TypeVar("Value")
MANY_LABELS = 10
NAMED = 3
"""Labels that a warning names."""


@dataclass
class SplitAssignment:
    """The sides of the rows of one dataset.

    `sides[split][i]` is the side of the i-th usable row of that split: train, validation (during training), test
    (what Evaluate scores) or left out. Where evaluation is on `validation`, rows of that side are scored too.
    """

    reader: DatasetReader
    scans: dict[str, Scan]
    sides: dict[str, list[SplitName]]
    evaluation: EvaluationSplit
    labels: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scored: set[tuple[str, int]] | None = None
    """(split, row number) of the rows that Evaluate scores, where `evaluation.maxRows` draws some; else all."""

    def count(self, side: SplitName) -> int:
        """Rows on that side."""
        return sum(sides.count(side) for sides in self.sides.values())

    @property
    def measured(self) -> int:
        """Rows that Evaluate scores."""
        return self.count(self.scored_side) if self.scored is None else len(self.scored)

    @property
    def scored_side(self) -> SplitName:
        """The side that Evaluate scores."""
        return "validation" if self.evaluation == "validation" else "test"


def assign_splits(
    dataset_readers: Sequence[tuple[DatasetReader, dict[str, Scan]]], spec: FineTuneJobSpec
) -> list[SplitAssignment]:
    """The splits of every dataset.

    Raises TrainerError (bad-data): a held-out label that never occurs in training, nothing left to train on.
    """
    assignments = []
    for reader, scans in dataset_readers:
        assignment = _assign(reader, scans, spec)
        _check_labels(assignment)
        _warn_of_labels(assignment)
        if not assignment.count("train"):
            raise TrainerError(FailureClass.BAD_DATA, f"No rows of {reader.name} are left for training.", reader.field)
        if spec.evaluation.max_rows is not None:
            assignment.scored = _draw_scored(assignment, spec.evaluation.max_rows)
        assignments.append(assignment)
    _note_contamination(assignments)
    return assignments


def _assign(reader: DatasetReader, scans: dict[str, Scan], job: FineTuneJobSpec) -> SplitAssignment:
    spec, own, split = reader.spec, reader.spec.splits, job.split
    train = scans[own.train]
    strata = train.labels if split.stratify else [""] * len(train)
    chosen: Sequence[int] = range(len(train))
    if spec.max_rows is not None:
        chosen = [i for i, taken in enumerate(draw(train.ranks, strata, spec.max_rows)) if taken]
    together, large = _together(train, chosen)
    asked = held_out_shares(job, spec, len(chosen))
    wanted: dict[SplitName, float] = {"test": asked.test, "validation": asked.validation}
    shares = {side: share for side, share in wanted.items() if share > 0}
    sides: list[SplitName] = ["left out"] * len(train)
    assigned = assign(_of(train.ranks, chosen), _of(strata, chosen), together, shares)
    for i, side in zip(chosen, assigned, strict=True):
        sides[i] = side
    assignment = SplitAssignment(reader, scans, {own.train: sides}, "none", ())
    if reader.task.traits.has_labels:
        trained = {label for label, side in zip(train.labels, sides, strict=True) if side == "train"}
        assignment.labels = tuple(sorted(trained))
    if own.validation is not None:
        assignment.sides[own.validation] = ["validation"] * len(scans[own.validation])
    if own.test is not None:
        assignment.sides[own.test] = ["test"] * len(scans[own.test])
    assignment.evaluation = _evaluation_split(assignment, selects_checkpoint(job))
    if assignment.evaluation == UNSEEN_HALF:
        where = own.validation or own.train
        _halve(assignment.sides[where], scans[where], split)
    _exclude_held_out(assignment)
    _note_duplicates(assignment, train, large, bool(shares))
    if split.validation is None and asked.validation > USUAL_VALIDATION:
        assignment.notes.append(
            f"{asked.validation:.0%} of the rows are held out instead of {USUAL_VALIDATION:.0%}, so that enough can be "
            "measured (split.validation is not set)"
        )
    return assignment


def _of(values: Sequence[Value], chosen: Sequence[int]) -> Sequence[Value]:
    """The values of the chosen rows: as they are where that is all of them, for there may be millions."""
    return values if len(chosen) == len(values) else [values[i] for i in chosen]


def _together(scan: Scan, chosen: Sequence[int]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """(what goes together among the chosen rows, sizes of the clusters too large for that)."""
    together, large = keep_together(scan.cluster[np.asarray(chosen, np.int64)])
    return (joined(together, _of(scan.groups, chosen)) if scan.groups else together), large


def _evaluation_split(assignment: SplitAssignment, selects: bool) -> EvaluationSplit:
    if assignment.count("test"):
        return "test"
    if not assignment.count("validation"):
        return "none"
    return UNSEEN_HALF if selects else "validation"


def _halve(sides: list[SplitName], scan: Scan, split: Split) -> None:
    """Move half of the validation rows to `test`: a checkpoint chosen on rows is no longer measured by them."""
    held = [i for i, side in enumerate(sides) if side == "validation"]
    strata = [scan.labels[i] if split.stratify else "" for i in held]
    together, _ = _together(scan, held)
    ranks = [scan.ranks[i] for i in held]
    halves = assign(ranks, strata, together, {"test": 0.5})
    if halves.count("test") < min(LEAST_ROWS, len(held) // 2):  # most labels have one row, which is not moved
        halves = assign(ranks, [""] * len(held), together, {"test": 0.5})
    for i, side in zip(held, halves, strict=True):
        sides[i] = "test" if side == "test" else "validation"


def _exclude_held_out(assignment: SplitAssignment) -> None:
    """Keep rows that `maxRows` left out from a baseline where they repeat a held-out row."""
    held = {
        int(assignment.scans[split].cluster[i])
        for split, sides in assignment.sides.items()
        for i, side in enumerate(sides)
        if side in ("validation", "test")
    }
    train = assignment.reader.spec.splits.train
    own, sides = assignment.scans[train].cluster, assignment.sides[train]
    for i, side in enumerate(sides):
        if side == "left out" and int(own[i]) in held:
            sides[i] = "excluded"


def _check_labels(assignment: SplitAssignment) -> None:
    if not assignment.reader.task.traits.has_labels:
        return
    name, known = assignment.reader.name, set(assignment.labels)
    for split, sides in assignment.sides.items():
        scan = assignment.scans[split]
        for row, label, side in zip(scan.rows, scan.labels, sides, strict=True):
            if side in ("validation", "test") and label not in known:
                lost = " maxRows may have drawn none of its rows: raise it." if assignment.reader.spec.max_rows else ""
                raise TrainerError(
                    FailureClass.BAD_DATA,
                    f"Label {label!r} of {name} ({split}, row {row}) is held out but never occurs in training."
                    f"{near_match(label, list(known))}{lost}",
                    f"{assignment.reader.field}.columns.label",
                )
    if len(known) < 2:
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"{name} has only one label ({next(iter(known), '')!r}), so there is nothing to classify.",
            f"{assignment.reader.field}.columns.label",
        )


def _warn_of_labels(assignment: SplitAssignment) -> None:
    """Labels that look like mistakes: written in several ways, contradicting each other, or nearly one per row."""
    if not assignment.reader.task.traits.has_labels:
        return
    name, scans = assignment.reader.name, assignment.scans.values()
    counts = Counter(label for scan in scans for label in scan.labels)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label in sorted(counts):
        alike["".join(fold(label).split())].append(label)
    several = [
        " and ".join(f"{label!r} ({counts[label]:,} rows)" for label in same) for same in alike.values() if same[1:]
    ]
    if several:
        assignment.warnings.append(
            f"{name}: labels that differ only in case or spaces are classes of their own: {'; '.join(several[:NAMED])}"
        )
    contradicting = _contradicting(scans, {label: code for code, label in enumerate(counts)})
    if contradicting:
        assignment.warnings.append(f"{name}: {contradicting:,} texts occur with different labels")
    if len(counts) > MANY_LABELS and 2 * len(counts) > counts.total():
        assignment.warnings.append(
            f"{name} has {len(counts):,} labels for {counts.total():,} rows, so most labels have one example: "
            "check columns.label"
        )


def _contradicting(scans: Collection[Scan], codes: dict[str, int]) -> int:
    """How many texts occur with several labels."""
    texts = np.concatenate([np.asarray(scan.inputs, np.uint64) for scan in scans])
    labels = np.fromiter((codes[label] for scan in scans for label in scan.labels), np.int64, len(texts))
    order = np.lexsort((labels, texts))
    texts, labels = texts[order], labels[order]
    return len(np.unique(texts[1:][(texts[1:] == texts[:-1]) & (labels[1:] != labels[:-1])]))


def _draw_scored(assignment: SplitAssignment, max_rows: int) -> set[tuple[str, int]]:
    held = [
        (scan.ranks[i], scan.labels[i], (split, scan.rows[i]))
        for split, sides in assignment.sides.items()
        for scan in [assignment.scans[split]]
        for i, side in enumerate(sides)
        if side == assignment.scored_side
    ]
    drawn = draw([rank for rank, _, _ in held], [label for _, label, _ in held], max_rows)
    return {key for (_, _, key), taken in zip(held, drawn, strict=True) if taken}


def _note_duplicates(assignment: SplitAssignment, train: Scan, large: list[int], cut: bool) -> None:
    duplicates = len(train) - len(np.unique(train.cluster))
    if duplicates:
        kept = ", kept on one side of the split" if cut else ""
        assignment.notes.append(f"{duplicates:,} rows are near-duplicates of others{kept} ({METHOD})")
    if large:
        assignment.warnings.append(
            f"{assignment.reader.name}: {len(large)} clusters of near-duplicates have more than 1% of the rows (the "
            f"largest {large[0]:,}) and were split like other rows, so held-out scores may be too high"
        )


def _note_contamination(assignments: Sequence[SplitAssignment]) -> None:
    """Held-out rows that occur, nearly word for word, in the training rows of any dataset of the job."""

    def of(assignment: SplitAssignment, *wanted: SplitName) -> npt.NDArray[np.int64]:
        parts = [
            assignment.scans[split].cluster[np.fromiter((side in wanted for side in sides), bool, len(sides))]
            for split, sides in assignment.sides.items()
        ]
        return np.concatenate(parts)

    trained = [(assignment.reader.name, of(assignment, "train")) for assignment in assignments]
    for assignment in assignments:
        held, met = of(assignment, "validation", "test"), False
        for name, train in trained:
            count = int(np.isin(held, train).sum())
            if count:
                met = True
                assignment.warnings.append(
                    f"{count:,} of {len(held):,} held-out rows of {assignment.reader.name} occur, nearly word for "
                    f"word, in the training rows of {name}"
                )
        wordless = sum(scan.counts.wordless for scan in assignment.scans.values())
        if wordless:
            assignment.notes.append(
                f"{wordless:,} rows have no text, so of their near-duplicates only equal rows are found"
            )
        if not met and len(held):
            judged = "no other held-out row" if wordless else "no held-out row"
            assignment.notes.append(f"{judged} occurs in the training rows of any dataset")
