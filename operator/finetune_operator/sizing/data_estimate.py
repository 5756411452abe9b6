"""How much data a job has, without the trainer: rows counted where the files are here, tokens from characters.

Reads local files only; neither asks the network nor imports a tokenizer. What is assumed is said in a note.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.holdout import held_out_shares, measured_rows, undecidable
from finetune_api.known_datasets import KNOWN_DATASETS
from finetune_api.report import LengthFacts
from finetune_api.spec import Dataset, FineTuneJobSpec
from finetune_operator.sizing.model_estimate import find_path

CHARACTERS_PER_TOKEN = 4.0
"""English text in today's vocabularies; other languages and code have fewer."""
TEMPLATE_TOKENS = 24
"""Tokens that prompt and chat template add to an example."""
SAMPLED_ROWS = 2000
"""Rows of a file whose length is measured; all are counted."""
ASSUMED_ROWS = 10_000
ASSUMED_TOKENS = 200
"""Of each row, for data that are not on this machine."""
LABEL_TOKENS = 4
"""Tokens of a label or a choice."""


@dataclass(frozen=True)
class DataEstimate:
    """Estimated lengths of the mixture's documents, and how each dataset's were found."""

    lengths: LengthFacts
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    """Why the gate cannot be decided on the rows that were counted."""


class _Rows(NamedTuple):
    total: int
    mean_tokens: float
    longest: int
    note: str
    counted: bool = True
    """Whether `total` was found, not assumed."""


def data_estimate(spec: FineTuneJobSpec, places: Sequence[Path]) -> DataEstimate:
    """Lengths of one epoch. Relative paths are looked for in `places`, in order. Never fails."""
    documents, longest, tokens, labelled, notes = 0, 0, 0.0, 0.0, []
    limit, counted = spec.training.max_sequence_length, dict[str, int]()
    for dataset in spec.datasets:
        rows = _rows_of(dataset, places)
        used = min(rows.total, dataset.max_rows or rows.total)
        shares = held_out_shares(spec, dataset, used)
        drawn = max(1, round(dataset.weight * round(used * (1 - shares.validation - shares.test))))
        if rows.counted and dataset.filter is None and dataset.task is not None and dataset.task.traits.form != "text":
            counted[dataset.name] = used
        mean = min(rows.mean_tokens, limit)
        share = dataset.task.traits.trained_share if dataset.task else None
        documents += drawn
        tokens += drawn * mean
        labelled += drawn * (min(LABEL_TOKENS, mean) if share is None else share * mean)
        longest = max(longest, min(rows.longest, limit))
        notes.append(f"{dataset.name}: {rows.note}")
    lengths = LengthFacts(documents=documents, tokens=round(tokens), longest=longest, labelled=round(labelled))
    return DataEstimate(lengths, tuple(notes), _about_the_gate(spec, counted))


def _about_the_gate(spec: FineTuneJobSpec, counted: Mapping[str, int]) -> tuple[str, ...]:
    """counted: rows of the datasets whose rows to measure follow from the split."""

    def measured_with(changed: FineTuneJobSpec) -> dict[str, int]:
        found = {d.name: measured_rows(changed, d, counted[d.name]) for d in changed.datasets if d.name in counted}
        return {name: rows for name, rows in found.items() if rows is not None}

    sentence = undecidable(spec, measured_with(spec), measured_with)
    return (sentence,) if sentence else ()


def _rows_of(dataset: Dataset, places: Sequence[Path]) -> _Rows:
    """The training rows before the split."""
    known = KNOWN_DATASETS.get(dataset.repo or "")
    if known is not None and (count := known.rows.get(dataset.splits.train)):
        tokens = known.characters / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
        return _Rows(count, tokens, round(2 * tokens), f"{count:,} rows, the known size of {dataset.repo}")
    files = _files(find_path(dataset.path, places)) if dataset.path is not None else []
    why = "is not on this machine"
    if files:
        try:
            return _measured(files, dataset)
        except Exception as error:  # whatever csv, json and pyarrow raise for a damaged file
            why = f"cannot be read ({type(error).__name__})"
    count = dataset.max_rows or ASSUMED_ROWS
    where = dataset.repo or dataset.path
    note = f"assumed {count:,} rows of {ASSUMED_TOKENS} tokens, because {where} {why}"
    return _Rows(count, ASSUMED_TOKENS, 4 * ASSUMED_TOKENS, note, counted=False)


def _files(path: Path) -> list[Path]:
    """The data files of a file or directory, without those of splits other than train."""
    if path.is_file():
        return [path] if path.suffix.lower() in _READERS else []
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in _READERS]
    train = [file for file in files if "train" in file.name.lower()]
    return train or [file for file in files if not any(word in file.name.lower() for word in ("test", "valid", "dev"))]


def _measured(files: list[Path], dataset: Dataset) -> _Rows:
    columns = [name for name in dataset.columns.model_dump(exclude_none=True).values() if isinstance(name, str)]
    count, sizes, labels = 0, list[int](), set[str]()
    for file in files:
        for number, row in enumerate(_READERS[file.suffix.lower()](file)):
            count += 1
            if number < SAMPLED_ROWS:
                sizes.append(_characters(row, columns))
                if isinstance(row, dict) and dataset.columns.label in row:
                    labels.add(str(row[dataset.columns.label]))
    if not sizes:
        return _Rows(1, 1.0, 1, "no rows were found", counted=False)
    overhead = 0 if dataset.task and dataset.task.traits.form == "text" else TEMPLATE_TOKENS
    if dataset.template is None:  # the prompt names all labels
        overhead += round(sum(len(label) + 2 for label in labels) / CHARACTERS_PER_TOKEN)
    mean = sum(sizes) / len(sizes) / CHARACTERS_PER_TOKEN + overhead
    longest = round(max(sizes) / CHARACTERS_PER_TOKEN) + overhead
    note = f"counted {count:,} rows, about {mean:.0f} tokens per row (estimated from characters)"
    if dataset.filter is not None:
        note += "; the filter is not applied"
    return _Rows(count, mean, max(1, longest), note)


def _characters(row: Any, columns: list[str]) -> int:
    """Characters of these columns of a row, of all if none of them is there."""
    if isinstance(row, dict):
        chosen = [row[name] for name in columns if name in row] or list(row.values())
        return sum(_characters(value, []) for value in chosen)
    if isinstance(row, list):
        return sum(_characters(value, []) for value in row)
    return len(str(row)) if row is not None else 0


def _csv_rows(path: Path) -> Iterator[Any]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield json.loads(line) if number < SAMPLED_ROWS else None
            except ValueError:
                yield None


def _json_list(path: Path) -> Iterator[Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        return
    if isinstance(data, dict):
        data = next((value for value in data.values() if isinstance(value, list)), list(data.values()))
    yield from data


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        return
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=SAMPLED_ROWS):
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".parquet": _parquet_rows,
}
