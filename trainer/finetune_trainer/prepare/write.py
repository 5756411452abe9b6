"""Second look at a dataset: every row rendered, tokenised and written where its side says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from finetune_api.report import FailureClass
from finetune_api.spec import Task
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.documents import DocumentWriter
from finetune_trainer.data.evaluation_rows import BaselineRow, RowWriter
from finetune_trainer.data.examples import Example
from finetune_trainer.data.render import Rendered, Rendering, few_shot_of
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.mixture import Division
from finetune_trainer.prepare.rendering import Order, Renderer, render_all, worker_count
from finetune_trainer.prepare.scan import BadRows
from finetune_trainer.prepare.split import Side


@dataclass
class Written:
    """What became of one dataset."""

    train: int = 0
    validation: int = 0
    scored: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    shortened_chats: int = 0
    dropped_turns: int = 0
    bad: BadRows = field(default_factory=BadRows)

    def notes(self, most: int) -> list[str]:
        """What was cut, in sentences."""
        notes = []
        if self.cut_rows:
            mean = self.cut_tokens // self.cut_rows
            notes.append(f"{self.cut_rows} texts were cut at their end to fit {most} tokens, by {mean} on average")
        if self.shortened_chats:
            notes.append(
                f"{self.shortened_chats} chats lost their oldest messages ({self.dropped_turns} in all) "
                f"to fit {most} tokens"
            )
        return notes


def rendering_of(division: Division, chat: ChatFormat, max_tokens: int) -> Rendering:
    """How the rows of a dataset are rendered, for all its splits."""
    spec, reading = division.reading.spec, division.reading
    return Rendering(
        task=reading.task,
        format=chat,
        max_tokens=max_tokens,
        labels=division.labels if reading.task is Task.CLASSIFICATION else (),
        may_be_unanswerable=any(scan.unanswerable for scan in division.scans.values()),
        system_prompt=spec.system_prompt,
        template=spec.template or "",
        answer_template=spec.answer_template or "",
        learn=spec.loss_on,
        label_column=str(reading.found.get("label", "")),
    )


class SideOf:
    """The side of each row by its number, in one byte a row; contains the rows whose side is wanted."""

    def __init__(self, rows: Sequence[int], sides: Sequence[Side], skipped: Container[Side]) -> None:
        """`rows`: numbers in ascending order, each with its side; rows on a `skipped` side are not contained."""
        self._codes = bytearray(rows[-1] + 1 if rows else 0)
        self._sides: list[Side] = [side for side in get_args(Side) if side not in skipped]
        code_of = {side: code for code, side in enumerate(self._sides, start=1)}
        for row, side in zip(rows, sides, strict=True):
            self._codes[row] = code_of.get(side, 0)

    def __contains__(self, row: object) -> bool:
        return isinstance(row, int) and row < len(self._codes) and self._codes[row] > 0

    def __getitem__(self, row: int) -> Side:
        return self._sides[self._codes[row] - 1]


@dataclass
class DatasetWriter:
    """Writes the rows of one dataset: documents, evaluation rows, baseline rows."""

    division: Division
    how: Rendering
    train: DocumentWriter
    validation: DocumentWriter
    directory: Path
    answer_tokens: int
    few_shot: int
    tick: Callable[[], None] = lambda: None

    def write(self) -> Written:
        """Write all rows. Raises TrainerError (bad-data) where too many do not fit, or nothing is left to train on."""
        written = Written()
        reading = self.division.reading
        examples = self._few_shot_examples()
        shots = few_shot_of(self.how, examples) if examples else None
        renderer = Renderer(self.how, reading.name, self.answer_tokens, shots)
        workers = worker_count(sum(self.division.count(side) for side in ("train", "validation", "test")))
        with ExitStack() as stack:
            scored = stack.enter_context(RowWriter(self.directory / "evaluation" / f"{reading.name}.jsonl"))
            baseline = None
            if reading.task is Task.CLASSIFICATION:
                baseline = stack.enter_context(RowWriter(self.directory / "baseline" / f"{reading.name}.jsonl"))
            sides: deque[Side] = deque()
            for order, outcome in render_all(renderer, self._orders(sides), workers):
                side = sides.popleft()
                self.tick()
                if outcome.problem:
                    written.bad.add(order.place, outcome.problem)
                    continue
                for row in outcome.rows:
                    scored.write(row)
                written.scored += len(outcome.rows)
                if outcome.rendered is not None:
                    self._write_documents(written, order.example, outcome.rendered, side)
                if baseline is not None and side in ("train", "left out"):
                    baseline.write(BaselineRow(order.example.text, order.example.answer, used=side == "train"))
        usable = sum(len(sides) for sides in self.division.sides.values()) - written.bad.count
        written.bad.check(usable, reading.name, reading.field)
        if not written.train:
            raise TrainerError(FailureClass.BAD_DATA, f"Nothing of {reading.name} is left to train on.", reading.field)
        return written

    def _orders(self, sides_given: deque[Side]) -> Iterator[Order]:
        """What is wanted of each row; its side is appended to `sides_given`."""
        for split, sides in self.division.sides.items():
            scan = self.division.scans[split]
            skipped: set[Side] = {"excluded"} if self.how.task is Task.CLASSIFICATION else {"excluded", "left out"}
            side_of = SideOf(scan.rows, sides, skipped)
            for example, place in self.division.reading.examples(scan.split, BadRows(), only=side_of):
                side = side_of[example.row]
                sides_given.append(side)
                yield Order(example, place, side in ("train", "validation"), self._is_scored(split, example, side))

    def _is_scored(self, split: str, example: Example, side: Side) -> bool:
        drawn = self.division.scored is None or (split, example.row) in self.division.scored
        return drawn and side == self.division.scored_side and self.division.evaluation != "none"

    def _write_documents(self, written: Written, example: Example, rendered: Rendered, side: Side) -> None:
        store = self.train if side == "train" else self.validation
        for document in rendered.documents:
            store.add(
                document.ids,
                document.target_position,
                document.target_id,
                dataset=self.division.reading.index,
                row=example.row,
            )
        count = len(rendered.documents)
        written.train += count if side == "train" else 0
        written.validation += count if side == "validation" else 0
        written.cut_rows += rendered.cut_tokens > 0
        written.cut_tokens += rendered.cut_tokens
        written.shortened_chats += rendered.dropped_turns > 0
        written.dropped_turns += rendered.dropped_turns

    def _few_shot_examples(self) -> list[Example]:
        """The first training rows by rank, label by label in turn: never a held-out row."""
        if not self.few_shot or self.how.task in (Task.CHAT, Task.TEXT):
            return []
        split = self.division.reading.spec.splits.train
        scan, sides = self.division.scans[split], self.division.sides[split]
        order = sorted((scan.ranks[i], i) for i, side in enumerate(sides) if side == "train")
        turn: dict[str, int] = {}
        by_turn = []
        for rank, i in order:
            turn[scan.labels[i]] = turn.get(scan.labels[i], -1) + 1
            by_turn.append((turn[scan.labels[i]], rank, scan.rows[i]))
        chosen = [row for _, _, row in sorted(by_turn)[: self.few_shot]]
        found = {
            example.row: example
            for example, _ in self.division.reading.examples(scan.split, BadRows(), only=set(chosen))
        }
        return [found[row] for row in chosen]
