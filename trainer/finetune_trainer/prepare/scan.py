"""First pass over a dataset: which rows can be used, and of each only what the split needs to know.

What is kept of a row is a few numbers, so memory grows with the count of rows and not with their text.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_api.report import FailureClass
from finetune_api.spec import Dataset
from finetune_api.structure import near_match
from finetune_api.traits import Task
from finetune_trainer.data.answers import AnswerForm, Found
from finetune_trainer.data.examples import UNANSWERABLE, Example, Reading, all_text, answer_survey, read_example
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.templates import TemplateRowError, check_template, compile_filter
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.columns import column_notes, find_columns
from finetune_trainer.prepare.dataset_files import format_of
from finetune_trainer.prepare.near_duplicates import SignatureFile, Signatures, signatures
from finetune_trainer.prepare.readers import FIELDS_FORMATS, Row, UnreadableFileError
from finetune_trainer.prepare.sources import DatasetSource, SourceRow, SplitSource
from finetune_trainer.prepare.split import content_key, occurrence
from finetune_trainer.prepare.workers import Workers

MAX_BAD_SHARE = 0.05
"""Share of unusable rows above which a dataset is refused: it is then more likely misunderstood than dirty."""
NAMED_BAD_ROWS = 5
_MARKS = re.compile(
    r"<\|[\w-]{1,40}\|>|<\uff5c[^<>\uff5c]{1,40}\uff5c>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|<fim_(?:prefix|middle|suffix|pad)>|<(?:SUF|MID|endoftext)>"
)
"""How chat templates and models for filling in write their special tokens."""


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

    def extend(self, later: BadRows) -> None:
        """Count those of the rows that follow."""
        self.count += later.count
        self.first += later.first[: NAMED_BAD_ROWS - len(self.first)]

    def check(self, usable: int, name: str, field: str) -> None:
        """Raise TrainerError (bad-data) where too many rows, or all, are unusable."""
        total = usable + self.count
        if not self.count or (usable and self.count <= MAX_BAD_SHARE * total):
            return
        share = f"None of the {total:,}" if not usable else f"Only {usable:,} of {total:,}"
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"{share} rows of {name} can be used; at most {MAX_BAD_SHARE:.0%} may be unusable "
            "(filter leaves rows out on purpose). "
            f"{'; '.join(self.first)}{'; …' if self.count > len(self.first) else '.'}",
            field,
        )


@dataclass
class DatasetReader:
    """How rows of one dataset become examples: the spec with the columns found."""

    spec: Dataset
    index: int
    task: Task
    columns: Found
    source: DatasetSource
    notes: list[str] = field(default_factory=list)
    """What was chosen, in sentences."""
    form: AnswerForm = AnswerForm.WRITTEN
    """What the answers are: known after `survey_answers`."""

    @property
    def name(self) -> str:
        """The dataset's name in the spec."""
        return self.spec.name

    @property
    def field(self) -> str:
        """Path of the dataset in the spec."""
        return f"datasets[{self.index}]"

    def rows(self, split: SplitSource, only: Container[int] | None = None) -> Iterator[SourceRow]:
        """The rows of a split as they are read. only: row numbers to look at, where not all are wanted.

        Raises TrainerError (bad-data) where a file is damaged.
        """
        try:
            for row in split:
                if only is None or row.number in only:
                    yield row
        except UnreadableFileError as error:
            raise TrainerError(FailureClass.BAD_DATA, f"{error}.", self.field) from error

    def example(self, row: SourceRow, split: SplitSource) -> Example | None:
        """The example of a row; None where the filter leaves it out. Raises BadRowError with the reason."""
        fields = self._kept(row)
        if fields is None:
            return None
        return read_example(
            self.task, row.number, fields, Reading(self.columns, split.class_names, self.form, split.columnar)
        )

    def _kept(self, row: SourceRow) -> Row | None:
        if row.fields is None:
            raise BadRowError(row.problem)
        try:
            return row.fields if not self.spec.filter or compile_filter(self.spec.filter)(row.fields) else None
        except TemplateRowError as error:
            raise BadRowError(str(error)) from error

    def survey_answers(self) -> None:
        """Find out what the answers are where a single row does not tell, from all rows that are used."""
        sources = [self.source.splits[split] for split in used_splits(self)]
        only_texts = all(format_of(file.name) in FIELDS_FORMATS for source in sources for file in source.files)
        survey = answer_survey(self.task, self.columns, only_texts=only_texts)
        if survey is None:
            return
        for row in (row for source in sources for row in self.rows(source)):
            with suppress(BadRowError):
                if fields := self._kept(row):
                    survey.add(fields)
            if survey.decided:
                break
        self.form = survey.form
        self.notes += survey.notes

    def examples(self, split: SplitSource, only: Container[int]) -> Iterator[Example]:
        """The examples of the rows with these numbers, of those that can be used."""
        for row in self.rows(split, only):
            with suppress(BadRowError):
                if example := self.example(row, split):
                    yield example


@dataclass
class ScanCounts:
    """How many rows are special in some way."""

    filtered: int = 0
    """Left out by the filter."""
    foreign: int = 0
    """Holding bytes that are not UTF-8."""
    unanswerable: int = 0
    """Questions without an answer."""
    marked: int = 0
    """Plain texts that hold special tokens of some model."""
    mark: str = ""
    """One of these tokens."""
    wordless: int = 0
    """Without a text to compare."""

    def add(self, later: ScanCounts) -> None:
        """Count those of the rows that follow."""
        self.filtered += later.filtered
        self.foreign += later.foreign
        self.unanswerable += later.unanswerable
        self.marked += later.marked
        self.mark = self.mark or later.mark
        self.wordless += later.wordless


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
    bad: BadRows
    inputs: Sequence[int]
    """Hash of each row's text; empty for tasks without labels."""
    counts: ScanCounts
    cluster: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """int64[n], the same in near-duplicates, over all scans of the job: known when all of them are done."""

    def __len__(self) -> int:
        return len(self.rows)


def open_reader(spec: Dataset, index: int, source: DatasetSource) -> DatasetReader:
    """Check splits, columns, templates and filter of a dataset against what is there.

    Raises TrainerError (bad-spec, bad-data) naming the field.
    """
    field = f"datasets[{index}]"
    if spec.task is None:
        raise TrainerError(
            FailureClass.BAD_SPEC, f"Set the task of {spec.name} to one of {', '.join(Task)}.", f"{field}.task"
        )
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
        raise TrainerError(FailureClass.BAD_DATA, f"{spec.name} has no rows ({source.origin}).", field)
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
    notes = column_notes(found, spec.columns, present, _used_otherwise(spec, present))
    unused = sorted(set(source.splits) - set(spec.splits.model_dump().values()))
    if unused:
        notes.append(f"splits that are not used: {', '.join(unused)} (datasets[].splits says which are)")
    return DatasetReader(spec, index, spec.task, found, source, notes)


def _used_otherwise(spec: Dataset, present: Sequence[str]) -> list[str]:
    """Columns that are used beside those of the task's roles: all that a template may name."""
    templates = " ".join(filter(None, (spec.template, spec.answer_template, spec.filter)))
    return [name for name in present if name == spec.group_by or re.search(rf"\b{re.escape(name)}\b", templates)]


def _check_templates(spec: Dataset, task: Task, present: tuple[str, ...], field: str) -> None:
    for name in task.traits.without_effect:
        if spec.to_wire().get(name) is not None:
            raise TrainerError(
                FailureClass.BAD_SPEC, f"{name} has no effect on task {task.value}: remove it.", f"{field}.{name}"
            )
    known = (*present, *task.traits.variables)
    if spec.template is not None:
        check_template(spec.template, known, f"{field}.template")
    if spec.answer_template is not None:
        check_template(
            spec.answer_template, (*known, "answer", "label", "summary", "completion"), f"{field}.answerTemplate"
        )
    if spec.filter is not None:
        check_template(spec.filter, present, f"{field}.filter", expression=True)


@dataclass
class RowScanner:
    """The first pass over rows of one split. Pure: the same in every process."""

    reader: DatasetReader
    split: SplitSource

    def __call__(self, rows: Sequence[SourceRow]) -> ScanChunk:
        """What is kept of these rows."""
        chunk, texts = ScanChunk(), list[str]()
        counts = chunk.counts
        traits, group_by = self.reader.task.traits, self.reader.spec.group_by
        for row in rows:
            counts.foreign += row.foreign_bytes
            try:
                example = self.reader.example(row, self.split)
            except BadRowError as error:
                chunk.bad.add(row.place, str(error))
                continue
            if example is None:
                counts.filtered += 1
                continue
            chunk.rows.append(example.row)
            chunk.contents.append(content_key(0, f"{example.text}\0{example.answer}"))
            # Interned: every row has read a text of its own.
            chunk.labels.append(sys.intern(example.answer) if traits.has_labels else "")
            if traits.has_labels:
                chunk.inputs.append(content_key(0, self._input(row, example)))
            if group_by is not None:
                chunk.groups.append(content_key(0, repr(example.variables.get(group_by))))
            counts.unanswerable += traits.may_be_unanswerable and example.answers == [UNANSWERABLE]
            if traits.form == "text" and (mark := _MARKS.search(example.text)):
                counts.marked, counts.mark = counts.marked + 1, counts.mark or mark[0]
            compared = self._compared_text(row, example)
            counts.wordless += not compared.strip()
            texts.append(compared if compared.strip() else repr(row.fields))
        chunk.signatures = signatures(texts)
        return chunk

    def _input(self, row: SourceRow, example: Example) -> str:
        """What a label is given to: with a template, everything that it may put into the prompt."""
        if self.reader.spec.template is None or row.fields is None:
            return example.text
        return repr([(name, value) for name, value in row.fields.items() if name != self.reader.columns["label"]])

    def _compared_text(self, row: SourceRow, example: Example) -> str:
        """What near-duplicates are found by: the input, and with a template all texts that it may put into it."""
        if self.reader.spec.template is None or row.fields is None:
            return example.text
        taken = [[column] if isinstance(column, str) else column for column in self.reader.columns.values()]
        others = all_text(row.fields, without=tuple(name for names in taken for name in names))
        return example.text if others in example.text else f"{example.text} {others}"


@dataclass
class ScanChunk:
    """What is kept of some rows."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    contents: array[int] = field(default_factory=lambda: array("Q"))
    groups: array[int] = field(default_factory=lambda: array("Q"))
    inputs: array[int] = field(default_factory=lambda: array("Q"))
    labels: list[str] = field(default_factory=list)
    signatures: Signatures = field(default_factory=lambda: signatures(()))
    """uint32[n, 64]."""
    bad: BadRows = field(default_factory=BadRows)
    counts: ScanCounts = field(default_factory=ScanCounts)

    def add(self, later: ScanChunk) -> None:
        """Append what is kept of the rows that follow, but for their signatures."""
        self.rows += later.rows
        self.contents += later.contents
        self.groups += later.groups
        self.inputs += later.inputs
        self.labels += map(sys.intern, later.labels)
        self.bad.extend(later.bad)
        self.counts.add(later.counts)


def scan(
    reader: DatasetReader,
    split: str,
    seed: int,
    near: SignatureFile,
    workers: Workers,
    tick: Callable[[int], None] = lambda rows: None,
) -> Scan:
    """Read a split once. Signatures go to `near`, row by row; `tick` is told every number of usable rows.

    Raises TrainerError (bad-data) where too few rows can be used.
    """
    source, kept = reader.source.splits[split], ScanChunk()
    for part in workers.carry_out(RowScanner(reader, source), reader.rows(source)):
        near.append(part.signatures)
        kept.add(part)
        tick(len(part.rows))
    kept.bad.check(len(kept.rows), reader.name, reader.field)
    if not kept.rows:
        why = f": the filter removes all {kept.counts.filtered:,}" if kept.counts.filtered else ""
        raise TrainerError(
            FailureClass.BAD_DATA, f"{reader.name} has no rows{why} ({split}, {reader.source.origin}).", reader.field
        )
    ranks = _ranks(kept.contents, seed)
    return Scan(source, kept.rows, ranks, kept.labels, kept.groups, kept.bad, kept.inputs, kept.counts)


def scan_all(
    dataset_readers: Sequence[DatasetReader],
    seed: int,
    workers: Workers,
    tick: Callable[[int], None] = lambda rows: None,
    directory: Path | None = None,
) -> list[tuple[DatasetReader, dict[str, Scan]]]:
    """The first pass over every split that is used, with near-duplicates over all of them.

    directory: where 256 bytes per row are kept until this is done; by default the directory for temporary files.
    """
    for reader in dataset_readers:
        reader.survey_answers()
    with SignatureFile(directory) as near:
        found = [
            (reader, {split: scan(reader, split, seed, near, workers, tick) for split in used_splits(reader)})
            for reader in dataset_readers
        ]
        clusters = near.clusters()
    begin = 0
    for _, scans in found:
        for of_split in scans.values():
            of_split.cluster = clusters[begin : begin + len(of_split)]
            begin += len(of_split)
    return found


def used_splits(reader: DatasetReader) -> list[str]:
    """Names of the dataset's own splits that the job uses, train first."""
    own = reader.spec.splits
    return list(dict.fromkeys(filter(None, (own.train, own.validation, own.test))))


def _ranks(contents: Sequence[int], seed: int) -> Sequence[int]:
    """The rank of each row: the same content for the second time is ranked anew.

    So a draw takes some of many copies, not all or none.
    """
    occurrences = occurrence(np.asarray(contents, np.uint64)).tolist()
    numbered = zip(contents, occurrences, strict=True)
    return array("Q", (content_key(seed, f"{content} {number}") for content, number in numbered))
