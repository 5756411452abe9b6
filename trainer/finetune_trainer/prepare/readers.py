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
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_LE
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from finetune_trainer.prepare.dataset_files import FORMATS, format_of

Row = dict[str, Any]
RowOrReason = Row | str

BATCH_ROWS = 1024
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

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
SWALLOWED_LINES = 3
"""Lines within one quoted field, all of them like rows, from which on a quotation mark must be missing."""

UTF_8 = "utf-8-sig"

_FOREIGN = re.compile("[\udc80-\udcff]")
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")

csv.field_size_limit(LONGEST_ROW)


class UnreadableFileError(Exception):
    """The file as a whole cannot be read; the message says why."""


def read_rows(path: Path) -> Iterator[RowOrReason]:
    """The rows of a file in order; in place of a row that cannot be read, the reason.

    Raises UnreadableFileError where the format is unknown or the file damaged.
    """
    name = format_of(path.name)
    if name is None:
        known = ", ".join(suffix.removeprefix(".") for suffix in FORMATS)
        raise UnreadableFileError(f"{path.name} is not in a supported format ({known})")
    try:
        yield from READERS[name](path)
    except (pa.ArrowException, OSError, EOFError, csv.Error, ValueError, OverflowError) as error:
        raise UnreadableFileError(f"{path.name} cannot be read: {_first_line(error)}") from error


def column_names(path: Path) -> list[str]:
    """Columns of a file: from its header or schema, for JSON from its first rows."""
    names: dict[str, None] = {}
    rows = read_rows(path)
    for _, row in zip(range(BATCH_ROWS), rows, strict=False):
        if isinstance(row, dict):
            names |= dict.fromkeys(_HALF.sub("\ufffd", as_windows_1252(str(name))) for name in row)
    return list(names)


def class_names(path: Path) -> dict[str, list[str]]:
    """Names of integer labels that a Parquet or Arrow file carries in its schema, by column."""
    schemas: dict[str | None, Callable[[Path], pa.Schema]] = {
        ".parquet": pyarrow.parquet.read_schema,
        ".arrow": _arrow_schema,
    }
    try:
        schema = schemas[format_of(path.name)](path)
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (pa.ArrowException, OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return {}  # it says nothing of them, or not as the datasets library writes it


def is_columnar(name: str) -> bool:
    """Whether a file's format gives all objects in a column the same keys, null where a row has none."""
    return format_of(name) in (".parquet", ".arrow")


def dialect_of(path: Path) -> str:
    """How a text file is written where that is unusual: `fields separated by tabs; UTF-16`. Empty otherwise."""
    if is_columnar(path.name):
        return ""
    with _Lines(path) as file:
        encoding = file.encoding
    found = [] if encoding == UTF_8 else [encoding.upper()]
    if format_of(path.name) in FIELDS_FORMATS:
        dialect = _dialect(path)
        if dialect.delimiter != FIELDS_FORMATS[str(format_of(path.name))]:
            found.append(f"fields separated by {DELIMITERS[dialect.delimiter]}")
        if not dialect.quoted:
            found.append("quotation marks are part of the fields, as some are not closed")
    return ", ".join(found)


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


def _encoding(beginning: bytes) -> str:
    """UTF-8 unless a byte order mark, or a zero in half of the bytes, says UTF-16 or UTF-32."""
    if beginning.startswith(BOM_UTF32_LE):
        return "utf-32"
    if beginning.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return "utf-16"
    zeros = beginning[0::2].count(0), beginning[1::2].count(0)
    if len(beginning) >= 4 and max(zeros) > 0.4 * (len(beginning) // 2) and not min(zeros):
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return UTF_8


class _Lines:
    """The lines of a text file, of which at most `LONGEST_ROW` characters make up a row."""

    def __init__(self, path: Path) -> None:
        stream = io.BufferedReader(_Decompressed(path), 1 << 16)
        self.encoding = _encoding(stream.peek(1 << 12)[: 1 << 12])
        errors = "surrogateescape" if self.encoding == UTF_8 else "replace"
        self._file = io.TextIOWrapper(stream, encoding=self.encoding, errors=errors, newline="")
        self._name, self.row, self._left = path.name, 1, LONGEST_ROW

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
                    f"{self._name} cannot be read: row {self.row} is longer than {LONGEST_ROW:,} characters"
                )
            yield line

    def next_row(self) -> None:
        """What is read from now on belongs to the next row."""
        self.row, self._left = self.row + 1, LONGEST_ROW

    def read_document(self) -> str:
        """The whole file."""
        text = self._file.read(LONGEST_DOCUMENT + 1)
        if len(text) > LONGEST_DOCUMENT:
            raise UnreadableFileError(
                f"{self._name} cannot be read: it has more than {LONGEST_DOCUMENT:,} characters; use JSON lines"
            )
        return text


@dataclass(frozen=True)
class _Dialect:
    """How fields are written."""

    delimiter: str
    quoted: bool = True
    """Whether a field may stand in quotation marks."""

    def reader(self, lines: Iterator[str]) -> Any:
        """Records of these lines."""
        if self.quoted:
            return csv.reader(lines, delimiter=self.delimiter, strict=True)
        return csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)


def _dialect(path: Path) -> _Dialect:
    """The delimiter is the most frequent one of the header. In TSV, quotation marks count if all of them close."""
    found = path.stat()
    return _dialect_of_version(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1000)  # a TSV file is read whole for it, and every pass over the rows asks again
def _dialect_of_version(path: Path, _modified: int, _size: int) -> _Dialect:
    if format_of(path.name) == ".tsv":
        return _Dialect("\t", quoted=_closes_its_quotes(path))
    with _Lines(path) as file:
        first = next(iter(file), "")
    return _Dialect(max(DELIMITERS, key=first.count))


def _closes_its_quotes(path: Path) -> bool:
    """Whether quotation marks are closed as CSV wants it, and not only by those of a later row."""
    spans_rows = False
    with _Lines(path) as file:
        try:
            for fields in _Dialect("\t").reader(iter(file)):
                file.next_row()
                spans_rows = spans_rows or any("\t" in field and "\n" in field for field in fields)
        except (csv.Error, UnreadableFileError, pa.ArrowException, OSError, EOFError):
            return False
    if not spans_rows:
        return True
    with _Lines(path) as file:
        widths = set()
        for line in file:
            file.next_row()
            widths.add(line.count("\t"))
    return len(widths) > 1  # without quotes, not all lines would be rows


def _read_fields(path: Path) -> Iterator[RowOrReason]:
    dialect = _dialect(path)
    with _Lines(path) as file:
        records = dialect.reader(iter(file))
        header = [as_windows_1252(name.strip()) for name in next(records, [])]
        _check_names(path.name, header)
        while True:
            line = records.line_num + 1
            try:
                fields = next(records, None)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise _open_quote(path, file.row, line, "is never closed") from error
                if records.line_num > line:
                    where = f"is not closed before line {records.line_num}"
                    raise _open_quote(path, file.row, line, where) from error
                if "expected after" not in str(error):
                    raise
                file.next_row()
                yield 'a quotation mark within a quoted field is not doubled ("")'
                continue
            if fields is None:
                return
            if fields:
                file.next_row()
                yield _row_of(header, fields, dialect, records.line_num - line)


def _open_quote(path: Path, row: int, line: int, where: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path.name} cannot be read: the quotation mark that opens in row {row} (line {line}) {where}; "
        "close it, and double the quotation marks within a field"
    )


def _row_of(header: list[str], fields: list[str], dialect: _Dialect, line_ends: int) -> RowOrReason:
    if len(fields) != len(header):
        return f"{len(fields)} fields, but the header has {len(header)}"
    for field in fields if line_ends > SWALLOWED_LINES and len(header) > 1 else ():
        lines = field.splitlines()[1:-1]
        if len(lines) >= SWALLOWED_LINES and all(line.count(dialect.delimiter) == len(header) - 1 for line in lines):
            return f"a quoted field holds {len(lines)} lines that look like rows: a quotation mark is not closed"
    return dict(zip(header, fields, strict=True))


def _check_names(file: str, names: list[str]) -> None:
    twice = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
    if twice is not None:
        raise UnreadableFileError(f"{file} cannot be read: several of its columns are called {twice!r}; rename them")


def _read_json_lines(path: Path) -> Iterator[RowOrReason]:
    with _Lines(path) as file:
        first = next((line for line in file if line.strip()), "")
    # An array that was given the ending of JSON lines.
    yield from _read_json(path) if first.lstrip().startswith("[") else _json_lines(path)


def _json_lines(path: Path) -> Iterator[RowOrReason]:
    with _Lines(path) as file:
        for line in file:
            if not line.strip():
                continue
            file.next_row()
            try:
                row = _json(line)
            except (ValueError, RecursionError, MemoryError) as error:
                yield f"not JSON: {_first_line(error)}"
                continue
            yield row if isinstance(row, dict) else "not a JSON object"


def _read_json(path: Path) -> Iterator[RowOrReason]:
    with _Lines(path) as file:
        text = file.read_document()
    try:
        document = _json(text)
    except (ValueError, RecursionError, MemoryError) as error:
        if "Extra data" in str(error):
            yield from _json_lines(path)
            return
        raise UnreadableFileError(f"{path.name} is not JSON: {_first_line(error)}") from error
    for row in _rows_of_document(document):
        yield row if isinstance(row, dict) else "not a JSON object"


def _json(text: str) -> Any:
    """The value of a JSON text. NaN and the infinities, which Python's writers add to JSON, hold no value."""
    return json.loads(text, parse_constant=lambda name: None)


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
        _check_names(path.name, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from map(_without_nan, batch.to_pylist())


def _read_arrow(path: Path) -> Iterator[RowOrReason]:
    with pa.memory_map(str(path)) as stream:
        for batch in _arrow_batches(stream):
            _check_names(path.name, batch.schema.names)
            batch.validate(full=True)  # offsets that lead out of a damaged file would end the process
            for begin in range(0, len(batch), BATCH_ROWS):
                yield from map(_without_nan, batch.slice(begin, BATCH_ROWS).to_pylist())


def _arrow_batches(stream: Any) -> Iterator[pa.RecordBatch]:
    """Of a stream, as the datasets library writes it, or of a file that knows where its batches lie (Feather)."""
    if stream.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(stream)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        stream.seek(0)
        yield from pyarrow.ipc.open_stream(stream)


def _arrow_schema(path: Path) -> pa.Schema:
    with pa.memory_map(str(path)) as stream:
        return pyarrow.ipc.open_stream(stream).schema


def _without_nan(row: Row) -> Row:
    """The row with null in place of a number that is none: what pandas writes for a missing text."""
    if all(value == value for value in row.values()):
        return row
    return {name: value if value == value else None for name, value in row.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


READERS: dict[str, Callable[[Path], Iterator[RowOrReason]]] = {
    ".csv": _read_fields,
    ".tsv": _read_fields,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}

FIELDS_FORMATS = {".csv": ",", ".tsv": "\t"}
"""Formats that hold nothing but text, with the usual delimiter."""
