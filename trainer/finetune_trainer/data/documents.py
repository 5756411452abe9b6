"""Tokenised documents on disk: flat arrays, memory-mapped, read by index in any order.

A document is a list of token ids with (position, target, weight) triples. A position is that of the hidden
state which predicts the target, counted from the document's first token: the token at index j is predicted at
position j - 1. There are no shifted labels anywhere. Nothing here may know about datasets, tasks or ranks.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
IntSequence = Sequence[int] | npt.NDArray[Any]

FORMAT = 1
HEADER = "store.json"
ARRAYS: dict[str, str] = {
    "ids": "<i4",
    "offsets": "<i8",
    "target_position": "<i4",
    "target_id": "<i4",
    "target_weight": "<f4",
    "target_offsets": "<i8",
    "dataset": "<i2",
    "row": "<i8",
}
"""Name and data type of each array; `<name>.bin` holds it raw."""


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """One training example. Arrays are views of the mapped files: never write to them.

    ids: int32[t]; target_position, target_id: int32[l]; target_weight: float32[l], with l <= t - 1.
    """

    ids: Int32
    target_position: Int32
    target_id: Int32
    target_weight: Float32
    dataset: int
    """Index of the dataset in the manifest."""
    id: int
    """Index in the store."""
    row: int = -1
    """Row number in the dataset's split, from 1, for error messages; -1 unknown."""


@dataclass
class DocumentBatch:
    """Documents end to end on their way to a store: a few arrays, which go from process to process at little cost."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    target_position: array[int] = field(default_factory=lambda: array("i"))
    target_id: array[int] = field(default_factory=lambda: array("i"))
    target_counts: array[int] = field(default_factory=lambda: array("q"))
    rows: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, ids: IntSequence, target_position: IntSequence, target_id: IntSequence, row: int) -> None:
        """Append one document. Raises ValueError where a target lies outside it or the lengths disagree."""
        if len(target_position) != len(target_id):
            raise ValueError("positions, targets and weights must have the same length")
        if len(target_position) and not 0 <= min(target_position) <= max(target_position) < len(ids):
            raise ValueError("a target's position lies outside its document")
        self.ids.extend(ids)
        self.lengths.append(len(ids))
        self.target_position.extend(target_position)
        self.target_id.extend(target_id)
        self.target_counts.append(len(target_id))
        self.rows.append(row)


class DocumentWriter:
    """Appends documents to the arrays of a directory, with memory that does not grow with the tokens.

    The store is readable only after `close` (or the end of the `with` block): the header is written last.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._files: dict[str, BinaryIO] = {name: (directory / f"{name}.bin").open("wb") for name in ARRAYS}
        self._tokens = self._targets = self._count = 0
        self._write("offsets", [0])
        self._write("target_offsets", [0])

    def _write(self, name: str, values: IntSequence | Sequence[float]) -> None:
        self._files[name].write(np.asarray(values, dtype=ARRAYS[name]).tobytes())

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        ids: IntSequence,
        target_position: IntSequence,
        target_id: IntSequence,
        target_weight: Sequence[float] | Float32 | None = None,
        *,
        dataset: int = 0,
        row: int = -1,
    ) -> int:
        """Append one document and return its index. Weights are 1 where left out.

        Raises ValueError where a target lies outside the document or the lengths disagree.
        """
        batch = DocumentBatch()
        batch.add(ids, target_position, target_id, row)
        weights = np.ones(len(target_id), np.float32) if target_weight is None else np.asarray(target_weight)
        if len(target_id) != len(weights):
            raise ValueError("positions, targets and weights must have the same length")
        self._append(batch, weights, dataset)
        return self._count - 1

    def extend(self, batch: DocumentBatch, *, dataset: int = 0) -> None:
        """Append the documents of a batch, with weights of 1."""
        self._append(batch, np.ones(len(batch.target_id), np.float32), dataset)

    def _append(self, batch: DocumentBatch, weights: Sequence[float] | Float32, dataset: int) -> None:
        count = len(batch)
        self._write("ids", np.asarray(batch.ids))
        self._write("offsets", self._tokens + np.cumsum(batch.lengths, dtype=np.int64))
        self._write("target_position", np.asarray(batch.target_position))
        self._write("target_id", np.asarray(batch.target_id))
        self._write("target_weight", weights)
        self._write("target_offsets", self._targets + np.cumsum(batch.target_counts, dtype=np.int64))
        self._write("dataset", np.full(count, dataset))
        self._write("row", np.asarray(batch.rows))
        self._tokens += len(batch.ids)
        self._targets += len(batch.target_id)
        self._count += count

    def close(self) -> None:
        """Flush the arrays and write the header that makes the store readable."""
        for file in self._files.values():
            file.close()
        header = {"format": FORMAT, "documents": self._count, "tokens": self._tokens, "targets": self._targets}
        (self.directory / HEADER).write_text(json.dumps(header))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        for file in self._files.values():
            file.close()


class DocumentStore:
    """Documents of a directory, mapped into memory: `store[i]` reads only the pages of document i."""

    def __init__(self, directory: Path) -> None:
        """Map the arrays of `directory`. Raises ValueError where a file is missing, cut, or of another format."""
        self.directory = directory
        try:
            header = json.loads((directory / HEADER).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory} holds no documents: {error}") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{directory} was written in format {header.get('format')}, not {FORMAT}")
        documents, tokens, targets = header["documents"], header["tokens"], header["targets"]
        self.ids: Int32 = self._map("ids", tokens)
        self.offsets: Int64 = self._map("offsets", documents + 1)
        self.target_position: Int32 = self._map("target_position", targets)
        self.target_id: Int32 = self._map("target_id", targets)
        self.target_weight: Float32 = self._map("target_weight", targets)
        self.target_offsets: Int64 = self._map("target_offsets", documents + 1)
        self.dataset: npt.NDArray[np.int16] = self._map("dataset", documents)
        self.row: Int64 = self._map("row", documents)

    def _map(self, name: str, length: int) -> npt.NDArray[Any]:
        path, dtype = self.directory / f"{name}.bin", np.dtype(ARRAYS[name])
        size = path.stat().st_size if path.exists() else -1
        if size != length * dtype.itemsize:
            raise ValueError(f"{path} is damaged: {size} bytes, expected {length * dtype.itemsize}")
        return np.memmap(path, dtype=dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lengths(self) -> Int64:
        """Tokens of each document, int64[n]."""
        return np.diff(self.offsets)

    @property
    def target_counts(self) -> Int64:
        """Labelled tokens of each document, int64[n]."""
        return np.diff(self.target_offsets)

    def __getitem__(self, index: int) -> StoredDocument:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        tokens = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        targets = slice(int(self.target_offsets[index]), int(self.target_offsets[index + 1]))
        return StoredDocument(
            ids=self.ids[tokens],
            target_position=self.target_position[targets],
            target_id=self.target_id[targets],
            target_weight=self.target_weight[targets],
            dataset=int(self.dataset[index]),
            id=index,
            row=int(self.row[index]),
        )

    def __iter__(self) -> Iterator[StoredDocument]:
        return (self[index] for index in range(len(self)))
