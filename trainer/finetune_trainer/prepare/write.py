"""Second pass over a dataset: every row rendered, tokenised and written where its side says."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, get_args

from finetune_api.report import FailureClass
from finetune_api.traits import Scoring
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.documents import DocumentWriter
from finetune_trainer.data.examples import Example
from finetune_trainer.data.render import Rendering, few_shot_of
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.mixture import SplitAssignment
from finetune_trainer.prepare.rendering import Outcome, Renderer, RowCounts, RowRequest
from finetune_trainer.prepare.split import SplitName
from finetune_trainer.prepare.workers import Workers


def rendering_of(assignment: SplitAssignment, chat: ChatFormat, max_tokens: int) -> Rendering:
    """How the rows of a dataset are rendered, for all its splits."""
    spec, reader = assignment.reader.spec, assignment.reader
    return Rendering(
        task=reader.task,
        format=chat,
        max_tokens=max_tokens,
        labels=assignment.labels if reader.task.traits.has_labels else (),
        may_be_unanswerable=any(scan.counts.unanswerable for scan in assignment.scans.values()),
        system_prompt=spec.system_prompt,
        template=spec.template or "",
        answer_template=spec.answer_template or "",
        loss_on=spec.loss_on,
        special_tokens=spec.special_tokens == "control",
        dataset=spec.name,
        label_column=str(reader.columns.get("label", "")),
    )


class RowSplitIndex:
    """The side of each row by its number, in one byte a row; contains the rows whose side is wanted."""

    def __init__(self, rows: Sequence[int], sides: Sequence[SplitName], skipped: Container[SplitName]) -> None:
        """`rows`: numbers in ascending order, each with its side; rows on a `skipped` side are not contained."""
        self._codes = bytearray(rows[-1] + 1 if rows else 0)
        self._sides: list[SplitName] = [side for side in get_args(SplitName) if side not in skipped]
        code_of = {side: code for code, side in enumerate(self._sides, start=1)}
        for row, side in zip(rows, sides, strict=True):
            self._codes[row] = code_of.get(side, 0)

    def __contains__(self, row: object) -> bool:
        return isinstance(row, int) and row < len(self._codes) and self._codes[row] > 0

    def __getitem__(self, row: int) -> SplitName:
        return self._sides[self._codes[row] - 1]


@dataclass
class DatasetWriter:
    """Writes the rows of one dataset: documents, evaluation rows, baseline rows."""

    assignment: SplitAssignment
    rendering: Rendering
    train: DocumentWriter
    validation: DocumentWriter
    directory: Path
    answer_tokens: int
    few_shot: int
    workers: Workers
    tick: Callable[[int], None] = lambda rows: None

    def write(self) -> RowCounts:
        """Write all rows. Raises TrainerError (bad-data) where too many do not fit, or nothing is left to train on."""
        written = RowCounts()
        reader = self.assignment.reader
        with ExitStack() as stack:
            scored = stack.enter_context(self._opened("evaluation"))
            baseline = None
            if reader.task.traits.has_labels:
                baseline = stack.enter_context(self._opened("baseline"))
            for outcome in self._outcomes():
                self.tick(outcome.rows)
                written.add(outcome.written)
                self.train.extend(outcome.train, dataset=reader.index)
                self.validation.extend(outcome.validation, dataset=reader.index)
                scored.write(outcome.scored)
                if baseline is not None:
                    baseline.write(outcome.baseline)
        usable = sum(len(sides) for sides in self.assignment.sides.values()) - written.bad.count
        written.bad.check(usable, reader.name, reader.field)
        if not written.train:
            raise TrainerError(FailureClass.BAD_DATA, f"No rows of {reader.name} are left for training.", reader.field)
        return written

    def _opened(self, folder: str) -> TextIO:
        path = self.directory / folder / f"{self.assignment.reader.name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        return path.open("w", encoding="utf-8")

    def _outcomes(self) -> Iterator[Outcome]:
        examples = self._few_shot_examples()
        shots = few_shot_of(self.rendering, examples) if examples else None
        expected = sum(self.assignment.count(side) for side in ("train", "validation", "test"))
        for split, sides in self.assignment.sides.items():
            renderer = Renderer(
                self.assignment.reader, self.assignment.scans[split].split, self.rendering, self.answer_tokens, shots
            )
            yield from self.workers.carry_out(renderer, self._orders(split, sides), expected)

    def _orders(self, split: str, sides: Sequence[SplitName]) -> Iterator[RowRequest]:
        """What to render of each row of a split."""
        scan = self.assignment.scans[split]
        skipped: set[SplitName] = {"excluded"} if self.rendering.task.traits.has_labels else {"excluded", "left out"}
        side_of = RowSplitIndex(scan.rows, sides, skipped)
        for row in self.assignment.reader.rows(scan.split, side_of):
            side = side_of[row.number]
            yield RowRequest(row, side, self._is_scored(split, row.number, side))

    def _is_scored(self, split: str, row: int, side: SplitName) -> bool:
        if side != self.assignment.scored_side or self.assignment.evaluation == "none":
            return False
        return self.assignment.scored is None or (split, row) in self.assignment.scored

    def _few_shot_examples(self) -> list[Example]:
        """The first training rows by rank, label by label in turn: never a held-out row."""
        if not self.few_shot or self.rendering.task.traits.scoring is Scoring.LIKELIHOOD:
            return []
        split = self.assignment.reader.spec.splits.train
        scan, sides = self.assignment.scans[split], self.assignment.sides[split]
        order = sorted((scan.ranks[i], i) for i, side in enumerate(sides) if side == "train")
        turn: dict[str, int] = {}
        by_turn = []
        for rank, i in order:
            turn[scan.labels[i]] = turn.get(scan.labels[i], -1) + 1
            by_turn.append((turn[scan.labels[i]], rank, scan.rows[i]))
        chosen = [row for _, _, row in sorted(by_turn)[: self.few_shot]]
        found = {example.row: example for example in self.assignment.reader.examples(scan.split, set(chosen))}
        return [found[row] for row in chosen]
