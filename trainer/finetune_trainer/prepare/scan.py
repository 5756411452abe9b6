"""First look at a dataset: which rows can be used, and of each only what the split needs to know.

What is kept of a row is a few numbers, so memory grows with the count of rows and not with their text.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune_api.report import FailureClass
from finetune_api.spec import Dataset, Task
from finetune_trainer.data.examples import BadRowError, Example, read_example
from finetune_trainer.data.render import TEMPLATE_VARIABLES
from finetune_trainer.data.templates import TemplateRowError, check_template, compile_filter, near_match
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.columns import find_columns
from finetune_trainer.prepare.near_duplicates import PERMUTATIONS, Signatures, signature
from finetune_trainer.prepare.readers import UnreadableFileError
from finetune_trainer.prepare.sources import DatasetSource, SplitSource
from finetune_trainer.prepare.split import content_key, occurrence

MAX_BAD_SHARE = 0.05
"""Share of unusable rows above which a dataset is refused: it is then more likely misunderstood than dirty."""
NAMED_BAD_ROWS = 5
UNDERSTOOD_BY_EYE = 20


@dataclass
class BadRows:
    """Rows that cannot be used: how many, and the first few by name."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.first) < NAMED_BAD_ROWS:
            self.first.append(f"{place}: {reason}")

    def check(self, usable: int, name: str, field: str) -> None:
        """Raise TrainerError (bad-data) where too many rows, or all, are unusable."""
        total = usable + self.count
        if not self.count or (usable and self.count <= MAX_BAD_SHARE * total):
            return
        share = "none" if not usable else f"only {usable} of {total}"
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"Of the rows of {name} {share} can be used; up to {MAX_BAD_SHARE:.0%} may be unusable. "
            f"{'; '.join(self.first)}{'; …' if self.count > len(self.first) else '.'}",
            field,
        )


@dataclass
class Reading:
    """How rows of one dataset become examples: the spec with the columns found."""

    spec: Dataset
    index: int
    task: Task
    found: Mapping[str, str | tuple[str, ...]]
    source: DatasetSource
    keep: Callable[[Mapping[str, Any]], bool] | None

    @property
    def name(self) -> str:
        """The dataset's name in the spec."""
        return self.spec.name

    @property
    def field(self) -> str:
        """Path of the dataset in the spec."""
        return f"datasets[{self.index}]"

    def examples(
        self, split: SplitSource, bad: BadRows, seen: Counts | None = None, only: Container[int] | None = None
    ) -> Iterator[tuple[Example, str]]:
        """(example, place) of each usable row that the filter keeps; others go to `bad` and `seen`.

        only: row numbers to look at, where not all are wanted.
        """
        try:
            for row in split:
                if only is not None and row.number not in only:
                    continue
                if row.fields is None:
                    bad.add(row.place, row.problem)
                    continue
                if seen is not None and row.foreign_bytes:
                    seen.foreign += 1
                try:
                    if self.keep is not None and not self.keep(row.fields):
                        if seen is not None:
                            seen.filtered += 1
                        continue
                    yield read_example(self.task, row.number, row.fields, self.found, split.class_names), row.place
                except (BadRowError, TemplateRowError) as error:
                    bad.add(row.place, str(error))
        except UnreadableFileError as error:
            raise TrainerError(FailureClass.BAD_DATA, f"{error}.", self.field) from error


@dataclass
class Counts:
    """Rows that were set aside or changed."""

    filtered: int = 0
    foreign: int = 0


@dataclass
class Scan:
    """The usable rows of one split, in order."""

    split: SplitSource
    rows: Sequence[int]
    """Row numbers, ascending."""
    ranks: Sequence[int]
    """`content_key` of each row."""
    labels: Sequence[str]
    """Label of each row; empty texts for tasks without labels."""
    groups: Sequence[int]
    """Hash of the `groupBy` value; empty without one."""
    signatures: Signatures
    """uint32[n, 64]."""
    bad: BadRows
    counts: Counts
    unanswerable: bool = False
    """Whether some question has no answer."""

    def __len__(self) -> int:
        return len(self.rows)


def open_reading(spec: Dataset, index: int, source: DatasetSource) -> Reading:
    """Check splits, columns, templates and filter of a dataset against what is there.

    Raises TrainerError (bad-spec, bad-data) naming the field.
    """
    field = f"datasets[{index}]"
    if spec.task is None:
        raise TrainerError(FailureClass.BAD_SPEC, f"Say the task of {spec.name}.", f"{field}.task")
    for role, wanted in spec.splits.model_dump().items():
        if wanted is not None and wanted not in source.splits:
            raise TrainerError(
                FailureClass.BAD_SPEC,
                f"{spec.name} has no split {wanted!r}.{near_match(wanted, source.splits)} "
                f"Its splits: {', '.join(sorted(source.splits))}.",
                f"{field}.splits.{role}",
            )
    present = source.splits[spec.splits.train].columns
    if not present:
        raise TrainerError(FailureClass.BAD_DATA, f"{spec.name} holds no rows ({source.origin}).", field)
    found = find_columns(
        spec.task, spec.columns, present, templated=spec.template is not None, where=spec.name, field=field
    )
    _check_templates(spec, spec.task, present, field)
    if spec.group_by is not None and spec.group_by not in present:
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"{spec.name} has no column {spec.group_by!r}.{near_match(spec.group_by, list(present))} "
            f"Its columns: {', '.join(present)}.",
            f"{field}.groupBy",
        )
    keep = compile_filter(spec.filter) if spec.filter else None
    return Reading(spec, index, spec.task, found, source, keep)


def _check_templates(spec: Dataset, task: Task, present: tuple[str, ...], field: str) -> None:
    without_effect = {
        Task.CHAT: ("template", "answer_template"),
        Task.TEXT: ("answer_template", "system_prompt"),
    }.get(task, ())
    for name in without_effect:
        if getattr(spec, name) is not None:
            camel = {"answer_template": "answerTemplate", "system_prompt": "systemPrompt"}.get(name, name)
            raise TrainerError(
                FailureClass.BAD_SPEC, f"{camel} has no effect on task {task.value}: remove it.", f"{field}.{camel}"
            )
    known = (*present, *TEMPLATE_VARIABLES[task])
    if spec.template is not None:
        check_template(spec.template, known, f"{field}.template")
    if spec.answer_template is not None:
        check_template(spec.answer_template, (*known, "answer", "label", "summary"), f"{field}.answerTemplate")
    if spec.filter is not None:
        check_template(spec.filter, present, f"{field}.filter", expression=True)


def scan(reading: Reading, split: str, seed: int, tick: Callable[[], None] = lambda: None) -> Scan:
    """Read a split once. `tick` is called for every usable row."""
    source, bad, counts = reading.source.splits[split], BadRows(), Counts()
    rows, contents, groups, labels, signatures = array("q"), array("Q"), array("Q"), list[str](), bytearray()
    unanswerable = False
    for example, _ in reading.examples(source, bad, counts):
        rows.append(example.row)
        contents.append(content_key(0, f"{example.text}\0{example.answer}"))
        # Interned: every row has read a text of its own.
        labels.append(sys.intern(example.answer) if reading.task is Task.CLASSIFICATION else "")
        if reading.spec.group_by is not None:
            groups.append(content_key(0, repr(example.variables.get(reading.spec.group_by))))
        unanswerable |= reading.task is Task.QUESTION_ANSWERING and example.answers == ["unanswerable"]
        signatures += signature(example.text).tobytes()
        tick()
    bad.check(len(rows), reading.name, reading.field)
    if not rows:
        why = f": the filter leaves none of {counts.filtered}" if counts.filtered else ""
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"{reading.name} holds no rows{why} ({split}, {reading.source.origin}).",
            reading.field,
        )
    of_rows = np.frombuffer(signatures, np.uint32).reshape(-1, PERMUTATIONS)
    return Scan(source, rows, _ranks(contents, seed), labels, groups, of_rows, bad, counts, unanswerable)


def _ranks(contents: Sequence[int], seed: int) -> Sequence[int]:
    """The rank of each row: the same content for the second time is ranked anew.

    So a draw takes some of many copies, not all or none.
    """
    occurrences = occurrence(np.array(contents, np.uint64)).tolist()
    numbered = zip(contents, occurrences, strict=True)
    return array("Q", (content_key(seed, f"{content} {number}") for content, number in numbered))
