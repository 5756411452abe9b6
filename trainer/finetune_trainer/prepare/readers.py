"""Rows of one file, one after the other, whatever the format: memory does not grow with the file.

A row that cannot be read is yielded as the reason why, with its number: bad rows are counted by those who know
how many are too many. JSON documents (`.json`) are the exception: they are read whole. Anybody may have written the
files, so that what they may become in memory is bounded.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

Row = dict[str, Any]
RowOrReason = Row | str

BATCH_ROWS = 1024
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
DELIMITERS = ",;\t|"

LONGEST_ROW = 1 << 24
"""Characters of a row of text at most, up to 64 MiB in memory."""
LONGEST_DOCUMENT = 1 << 29
"""Characters of a JSON document at most."""
EXPANSION = 200
"""How many times its size a compressed file may become; rows of ordinary data become 5 to 50 times their size."""
ANY_EXPANSION_BYTES = 64 << 20
"""So much any compressed file may become."""
DEEPEST = 100
"""Lists and objects within each other at most."""

_FOREIGN = re.compile("[\udc80-\udcff]")
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")

csv.field_size_limit(LONGEST_ROW)


class UnreadableFileError(Exception):
    """The file as a whole cannot be read; the message says why."""


def format_of(name: str) -> str | None:
    """The format that a file name stands for (`.csv` for `a/b.csv.gz`), or None."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in READERS else None


def read_rows(path: Path) -> Iterator[RowOrReason]:
    """The rows of a file in order; in place of a row that cannot be read, the reason.

    Raises UnreadableFileError where the format is unknown or the file damaged.
    """
    name = format_of(path.name)
    if name is None:
        known = ", ".join(suffix.removeprefix(".") for suffix in READERS)
        raise UnreadableFileError(f"{path.name} is not in a supported format ({known})")
    try:
        yield from READERS[name](path)
    except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
        raise UnreadableFileError(f"{path.name} cannot be read: {_first_line(error)}") from error


def column_names(path: Path) -> list[str]:
    """Columns of a file: from its header or schema, for JSON from its first rows."""
    names: dict[str, None] = {}
    rows = read_rows(path)
    for _, row in zip(range(BATCH_ROWS), rows, strict=False):
        if isinstance(row, dict):
            names |= dict.fromkeys(str(name) for name in row)
    return list(names)


def class_names(path: Path) -> dict[str, list[str]]:
    """Names of integer labels that a Parquet or Arrow file carries in its schema, by column."""
    if format_of(path.name) != ".parquet":
        return {}
    try:
        schema = pyarrow.parquet.read_schema(path)
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}
    features = metadata.get("info", {}).get("features", {})
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def texts_in(value: object, deepest: int = DEEPEST) -> Iterator[str]:
    """All texts of a row, those within lists and objects too; keys are none.

    Raises RecursionError where more than `deepest` of these lie within each other.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        if not deepest:
            raise RecursionError(f"more than {DEEPEST} lists and objects are nested")
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner, deepest - 1)


def has_foreign_bytes(text: str) -> bool:
    """Whether the text came from bytes that are not UTF-8 (see `as_windows_1252`)."""
    return _FOREIGN.search(text) is not None


def half_character(text: str) -> str | None:
    """Half of a surrogate pair that stands alone, as an escape: JSON can write one, UTF-8 cannot. None without one."""
    found = _HALF.search(text)
    return f"\\u{ord(found[0]):04x}" if found else None


def decoded(value: Any) -> Any:
    """The value with all of its texts `as_windows_1252`."""
    if isinstance(value, str):
        return as_windows_1252(value)
    if isinstance(value, dict):
        return {key: decoded(inner) for key, inner in value.items()}
    return [decoded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def as_windows_1252(text: str) -> str:
    """The text with each byte that was not UTF-8 read as Windows-1252, which is what such files mostly are."""
    return "".join(_windows_1252(char) if "\udc80" <= char <= "\udcff" else char for char in text)


def _windows_1252(char: str) -> str:
    byte = bytes([ord(char) - 0xDC00])
    try:
        return byte.decode("cp1252")
    except UnicodeDecodeError:
        return byte.decode("latin-1")


class _Decompressed(io.RawIOBase):
    """The bytes of a file that may be compressed. Reading raises UnreadableFileError where they become too many."""

    def __init__(self, path: Path) -> None:
        self._stream = pa.input_stream(str(path), compression="detect")
        self._name, self._left = path.name, ANY_EXPANSION_BYTES + EXPANSION * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer) as view:
            data = self._stream.read(len(view))
            view[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise UnreadableFileError(
                f"{self._name} cannot be read: it would become more than {EXPANSION} times its size; decompress it"
            )
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Lines:
    """The lines of a text file, of which at most `LONGEST_ROW` characters make up a row."""

    def __init__(self, path: Path) -> None:
        stream = io.BufferedReader(_Decompressed(path), 1 << 16)
        self._file = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._name, self._row, self._left = path.name, 0, LONGEST_ROW

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        # As a generator, of which csv takes as many lines as a row has.
        while line := self._file.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                raise UnreadableFileError(
                    f"{self._name} cannot be read: row {self._row + 1} is longer than {LONGEST_ROW:,} characters"
                )
            yield line

    def next_row(self) -> None:
        """What is read from now on belongs to the next row."""
        self._row, self._left = self._row + 1, LONGEST_ROW

    def read_document(self) -> str:
        """The whole file."""
        text = self._file.read(LONGEST_DOCUMENT + 1)
        if len(text) > LONGEST_DOCUMENT:
            raise UnreadableFileError(
                f"{self._name} cannot be read: it has more than {LONGEST_DOCUMENT:,} characters; use JSON lines"
            )
        return text


def _read_csv(path: Path, delimiter: str | None = None) -> Iterator[RowOrReason]:
    with _Lines(path) as file:
        first = next(iter(file), "")
    delimiter = delimiter or max(DELIMITERS, key=first.count)
    with _Lines(path) as file:
        lines = csv.reader(file, delimiter=delimiter, strict=False)
        header = [name.strip() for name in next(lines, [])]
        for fields in lines:
            if not fields:
                continue
            file.next_row()
            if len(fields) != len(header):
                yield f"{len(fields)} fields, but the header has {len(header)}"
            else:
                yield dict(zip(header, fields, strict=True))


def _read_tsv(path: Path) -> Iterator[RowOrReason]:
    return _read_csv(path, "\t")


def _read_json_lines(path: Path) -> Iterator[RowOrReason]:
    with _Lines(path) as file:
        for line in file:
            if not line.strip():
                continue
            file.next_row()
            try:
                row = json.loads(line)
            except (ValueError, RecursionError, MemoryError) as error:
                yield f"not JSON: {_first_line(error)}"
                continue
            yield row if isinstance(row, dict) else "not a JSON object"


def _read_json(path: Path) -> Iterator[RowOrReason]:
    with _Lines(path) as file:
        text = file.read_document()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        if "Extra data" in str(error):
            yield from _read_json_lines(path)
            return
        raise UnreadableFileError(f"{path.name} is not JSON: {_first_line(error)}") from error
    for row in _rows_of_document(document):
        yield row if isinstance(row, dict) else "not a JSON object"


def _rows_of_document(document: Any) -> list[Any]:
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        return [document]
    lists = [value for value in document.values() if isinstance(value, list)]
    if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
        return list(lists[0])
    if lists and len(lists) == len(document) and len({len(values) for values in lists}) == 1:
        return [dict(zip(document, values, strict=True)) for values in zip(*lists, strict=True)]
    if document and all(isinstance(value, dict) for value in document.values()):
        return list(document.values())
    return [document]


def _read_text(path: Path) -> Iterator[RowOrReason]:
    with _Lines(path) as file:
        for line in file:
            if line.strip():
                file.next_row()
                yield {"text": line.rstrip("\r\n")}


def _read_parquet(path: Path) -> Iterator[RowOrReason]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[RowOrReason]:
    with pa.memory_map(str(path)) as stream:
        for batch in pyarrow.ipc.open_stream(stream):
            yield from batch.to_pylist()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


READERS: dict[str, Callable[[Path], Iterator[RowOrReason]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
