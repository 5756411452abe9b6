"""A dataset on this machine: the rows of its splits, with their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import sha256_of
from finetune_trainer.prepare import readers
from finetune_trainer.prepare.dataset_files import FORMATS, choose_files, format_of, note_unused
from finetune_trainer.prepare.readers import Row, UnreadableFileError
from finetune_trainer.prepare.readme import Head


class SourceRow(NamedTuple):
    """One row of a split: its columns, or why it cannot be read."""

    number: int
    """From 1, counted over all files of the split."""
    file: str
    in_file: int
    """Number in that file, from 1."""
    fields: Row | None
    problem: str = ""
    foreign_bytes: bool = False
    """Whether some bytes were not UTF-8 and were read as Windows-1252."""

    @property
    def place(self) -> str:
        """`train.csv, row 12`."""
        return f"{self.file}, row {self.in_file}"


@dataclass(frozen=True)
class SplitSource:
    """The files of one split."""

    name: str
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def columnar(self) -> bool:
        """Whether the format gives all objects in a column the same keys."""
        return readers.is_columnar(self.files[0].name)

    def __iter__(self) -> Iterator[SourceRow]:
        number = 0
        for path in self.files:
            file = path.name
            for in_file, row in enumerate(readers.read_rows(path), start=1):
                number += 1
                yield _source_row(number, file, in_file, row)


@dataclass(frozen=True)
class DatasetSource:
    """A dataset on this machine."""

    splits: dict[str, SplitSource]
    origin: str
    """`owner/name@commit` or `path sha256:…`."""
    notes: tuple[str, ...] = ()


def open_source(
    root: Path, files: dict[str, list[str]], names: dict[str, list[str]], origin: str, notes: tuple[str, ...] = ()
) -> DatasetSource:
    """A dataset of files below `root`. `names`: class names from the README, used where the files have none."""
    splits: dict[str, SplitSource] = {}
    dialects: dict[str, None] = {}
    for split, members in files.items():
        paths = tuple(root / member for member in members)
        try:
            columns = dict.fromkeys(name for path in paths[:1] for name in readers.column_names(path))
            found = [(path.name, readers.dialect_of(path)) for path in paths]
        except UnreadableFileError as error:
            raise TrainerError(FailureClass.BAD_DATA, f"{error}.") from error
        splits[split] = SplitSource(split, paths, tuple(columns), names | readers.class_names(paths[0]))
        dialects |= dict.fromkeys(f"{name}: {dialect}" for name, dialect in found if dialect)
    return DatasetSource(splits, origin, (*notes, *dialects))


def open_path(path: Path, given: str, config: str | None, field: str) -> DatasetSource:
    """The dataset of a file (one split, `train`) or a directory. `given` is the path as the user wrote it."""
    names: dict[str, list[str]] = {}
    notes: tuple[str, ...] = ()
    if path.is_file():
        if format_of(path.name) is None:
            known = ", ".join(suffix.removeprefix(".") for suffix in FORMATS)
            raise TrainerError(
                FailureClass.BAD_SPEC, f"{given} is not in a supported format ({known}).", f"{field}.path"
            )
        files, root = {"train": [path.name]}, path.parent
    else:
        members = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
        for member in members:
            if readers.has_foreign_bytes(member):
                raise TrainerError(
                    FailureClass.BAD_DATA,
                    f"{given} holds a file whose name is not UTF-8, {member!r}: rename it.",
                    field,
                )
        head = Head.read(path)
        files, chosen = choose_files(members, head, config, field)
        root, names, notes = path, head.class_names(chosen), note_unused(members, files, head, config)
    return open_source(root, files, names, f"{given} sha256:{digest_of_files(root, files)}", notes)


def digest_of_files(root: Path, files: dict[str, list[str]]) -> str:
    """sha256 over the names and contents of the files."""
    total = sha256()
    for split, members in sorted(files.items()):
        for member in members:
            total.update(f"{split}/{member}\0{sha256_of(root / member)}\n".encode())
    return total.hexdigest()


def _source_row(number: int, file: str, in_file: int, row: Row | str) -> SourceRow:
    if isinstance(row, str):
        return SourceRow(number, file, in_file, None, row)
    try:
        texts = [text for text in readers.texts_in(row) if not text.isascii()]
    except RecursionError as error:
        return SourceRow(number, file, in_file, None, str(error))
    half = next(filter(None, map(readers.half_character, texts)), None)
    if half:
        problem = f"a text contains half of a surrogate pair, {half}"
        return SourceRow(number, file, in_file, None, problem)
    foreign = any(map(readers.has_foreign_bytes, texts))
    return SourceRow(number, file, in_file, readers.decoded(row) if foreign else row, "", foreign)
