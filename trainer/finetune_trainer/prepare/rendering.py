"""Rows rendered and tokenised, many at a time: what goes into the stores and files, ready to be appended to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from finetune_trainer.data.documents import DocumentBatch
from finetune_trainer.data.evaluation_rows import BaselineRow, json_line
from finetune_trainer.data.examples import Example
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.render import FewShot, Rendered, Rendering, render_evaluation, render_training
from finetune_trainer.prepare.scan import BadRows, DatasetReader
from finetune_trainer.prepare.sources import SourceRow, SplitSource
from finetune_trainer.prepare.split import SplitName

MOST_NOTES = 10


class RowRequest(NamedTuple):
    """One row and what to render of it."""

    row: SourceRow
    side: SplitName
    scored: bool
    """Whether Evaluate scores it."""


@dataclass
class RowCounts:
    """What became of rows of one dataset."""

    train: int = 0
    validation: int = 0
    scored: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    shortened_chats: int = 0
    dropped_turns: int = 0
    checked: int = 0
    """Documents of chats whose tokens are those of the chat template."""
    noted: Counter[str] = field(default_factory=Counter)
    """Rows with each of the notes that their rendering made."""
    bad: BadRows = field(default_factory=BadRows)

    def add(self, later: RowCounts) -> None:
        """Count the rows that follow."""
        self.train += later.train
        self.validation += later.validation
        self.scored += later.scored
        self.cut_rows += later.cut_rows
        self.cut_tokens += later.cut_tokens
        self.shortened_chats += later.shortened_chats
        self.dropped_turns += later.dropped_turns
        self.checked += later.checked
        self.noted += later.noted
        self.bad.extend(later.bad)

    def notes(self, most: int) -> list[str]:
        """What was cut, in sentences."""
        notes = []
        if self.cut_rows:
            mean = self.cut_tokens // self.cut_rows
            notes.append(f"{self.cut_rows:,} texts truncated to fit {most:,} tokens, by {mean:,} tokens on average")
        if self.shortened_chats:
            notes.append(
                f"{self.shortened_chats:,} chats lost their oldest messages ({self.dropped_turns:,} in total) "
                f"to fit {most:,} tokens"
            )
        notes += [f"{note}: {count:,} rows" for note, count in self.noted.most_common(MOST_NOTES)]
        if self.checked:
            documents = self.train + self.validation
            notes.append(f"{self.checked:,} of {documents:,} documents have exactly the tokens of the chat template")
        return notes


@dataclass
class Outcome:
    """What became of some rows, each part in their order."""

    rows: int
    written: RowCounts = field(default_factory=RowCounts)
    train: DocumentBatch = field(default_factory=DocumentBatch)
    validation: DocumentBatch = field(default_factory=DocumentBatch)
    scored: str = ""
    """Lines of `evaluation/<dataset>.jsonl`."""
    baseline: str = ""
    """Lines of `baseline/<dataset>.jsonl`."""

    def add_documents(self, rendered: Rendered, row: int, side: SplitName) -> None:
        """Append the documents of a row."""
        store = self.train if side == "train" else self.validation
        for document in rendered.documents:
            store.add(document.ids, document.target_position, document.target_id, row)
        count, written = len(rendered.documents), self.written
        written.train += count if side == "train" else 0
        written.validation += count if side == "validation" else 0
        written.cut_rows += rendered.cut_tokens > 0
        written.cut_tokens += rendered.cut_tokens
        written.shortened_chats += rendered.dropped_turns > 0
        written.dropped_turns += rendered.dropped_turns
        written.checked += rendered.checked
        written.noted.update(rendered.notes)


@dataclass(frozen=True)
class Renderer:
    """How the rows of one split are rendered. Pure: the same in every process."""

    reader: DatasetReader
    split: SplitSource
    rendering: Rendering
    answer_tokens: int
    shots: FewShot | None

    def __call__(self, orders: Sequence[RowRequest]) -> Outcome:
        """Render these rows."""
        outcome, scored, baseline = Outcome(len(orders)), list[str](), list[str]()
        for order in orders:
            try:
                example = self.reader.example(order.row, self.split)
                if example is None:
                    continue
                lines = self._scored(example) if order.scored else []
                if order.side in ("train", "validation"):
                    outcome.add_documents(render_training(self.rendering, example), example.row, order.side)
            except BadRowError as error:
                outcome.written.bad.add(order.row.place, str(error))
                continue
            scored += lines
            if self.rendering.task.traits.has_labels and order.side in ("train", "left out"):
                baseline.append(json_line(BaselineRow(example.text, example.answer, used=order.side == "train")))
        outcome.written.scored = len(scored)
        outcome.scored, outcome.baseline = "".join(scored), "".join(baseline)
        return outcome

    def _scored(self, example: Example) -> list[str]:
        rows = render_evaluation(
            self.rendering, example, self.reader.name, answer_tokens=self.answer_tokens, few_shot=self.shots
        )
        return [json_line(row) for row in rows]
