"""What can be known of a job without its trainer: the model's shape, the data's size, the GPUs of this machine.

Reads local files; asks no network and imports neither torch nor a tokenizer. Whatever is estimated or assumed says so.
"""

from __future__ import annotations

import csv
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from finetune_api.known_datasets import KNOWN_DATASETS
from finetune_api.report import LengthFacts, ModelFacts
from finetune_api.spec import Dataset, FineTuneJobSpec
from finetune_api.traits import Task
from finetune_operator import devices
from finetune_operator.errors import UserError
from finetune_operator.sizing.gpus import Gpu, find_gpu
from finetune_operator.sizing.model_shapes import UnknownShapeError, known_model, model_facts

CHARACTERS_PER_TOKEN = 4.0
"""English text in today's vocabularies; other languages and code have fewer."""
TEMPLATE_TOKENS = 24
"""Tokens that prompt and chat template add to an example."""
SAMPLED_ROWS = 2000
"""Rows of a file whose length is measured; all are counted."""
ASSUMED_ROWS = 10_000
ASSUMED_TOKENS = 200
"""For data that cannot be seen from here."""
LABEL_TOKENS = 4
"""Tokens of a label or a choice."""


def gpu_here(gpu: devices.Gpu) -> Gpu | None:
    """The kind of a GPU of this machine, with the memory that its driver names; None if it is not known."""
    known = find_gpu(gpu.name)
    if known is None or gpu.memory_bytes is None:
        return known
    return Gpu(known.name, min(known.memory_bytes, gpu.memory_bytes), known.flops, known.bf16)


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU has instructions for bf16 products (the trainer computes in it then)."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelEstimate:
    """The model's shape and where it was read."""

    facts: ModelFacts
    origin: str


def model_estimate(spec: FineTuneJobSpec, places: Sequence[Path], config: Path | None = None) -> ModelEstimate:
    """The base model's shape: from `config`, from its directory or GGUF file, from the Hub's cache, or by its name.

    Relative paths are looked for in `places`, in order.

    Raises UserError if none of these knows it.
    """
    model = spec.model
    if config is not None:
        return ModelEstimate(_facts(_json(config)), str(config))
    if model.path is not None:
        return _from_path(_found(model.path, places))
    assert model.repo is not None
    cached = _in_hub_cache(model.repo, model.revision)
    if cached is not None:
        return ModelEstimate(_facts(_json(cached)), f"the config.json of {model.repo} in the Hub's cache")
    known = known_model(model.repo)
    if known is None:
        raise UserError(
            f"The shape of {model.repo} is not known here and the Hub is not asked: save its config.json and name it "
            "with --model-config FILE."
        )
    return ModelEstimate(known, f"the name {model.repo} (the Hub was not asked)")


def _found(path: str, places: Sequence[Path]) -> Path:
    """Where a path of the spec is; where it would be looked for first if it is nowhere."""
    paths = [place / path for place in places]
    return next((candidate for candidate in paths if candidate.exists()), paths[0])


def _from_path(path: Path) -> ModelEstimate:
    if path.suffix == ".gguf" and path.is_file():
        return ModelEstimate(gguf_facts(path), str(path))
    if path.is_dir() and (path / "config.json").is_file():
        return ModelEstimate(_facts(_json(path / "config.json"), _counted(path)), str(path / "config.json"))
    if path.is_dir() and (ggufs := sorted(path.glob("*.gguf"))):
        return ModelEstimate(gguf_facts(ggufs[0]), str(ggufs[0]))
    what = "has no config.json" if path.is_dir() else "is not there"
    raise UserError(f"model.path: {path} {what}: name the model's config.json with --model-config FILE.")


def _facts(config: dict[str, Any], parameters: int | None = None) -> ModelFacts:
    try:
        return model_facts(config, parameters)
    except (UnknownShapeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"The model's shape cannot be read: {error}.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: name a model's config.json.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not the config.json of a model.")
    return data


def _counted(directory: Path) -> int | None:
    """Elements of all tensors, from the headers of the safetensors files."""
    total = 0
    tied = bool(_json(directory / "config.json").get("tie_word_embeddings"))
    for path in directory.glob("model*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            prod(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__" and not (tied and name == "lm_head.weight")
        )
    return total or None


def _in_hub_cache(repo: str, revision: str) -> Path | None:
    """A config.json that huggingface_hub has downloaded before."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{repo.replace('/', '--')}"
    reference = cache / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    config = cache / "snapshots" / commit / "config.json"
    return config if config.is_file() else None


_GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the fixed-size value types of GGUF (github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
_GGUF_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def gguf_facts(path: Path) -> ModelFacts:
    """The shape in the head of a GGUF file. Raises UserError if it is none."""
    try:
        with path.open("rb") as file:
            metadata, shapes = _gguf_head(file)
    except (OSError, struct.error, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a GGUF file that can be read: {error}.") from error
    kind = str(metadata.get("general.architecture", ""))
    sizes = {key.removeprefix(f"{kind}."): value for key, value in metadata.items()}
    vocabulary = shapes["token_embd.weight"][1] if "token_embd.weight" in shapes else sizes.get("vocab_size", 0)
    head_dim = sizes.get("attention.key_length")
    config = {
        "architectures": [_GGUF_ARCHITECTURES.get(kind, kind)],
        "hidden_size": sizes.get("embedding_length"),
        "intermediate_size": sizes.get("feed_forward_length"),
        "num_hidden_layers": sizes.get("block_count"),
        "num_attention_heads": sizes.get("attention.head_count"),
        "num_key_value_heads": sizes.get("attention.head_count_kv"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in shapes,
        "max_position_embeddings": sizes.get("context_length"),
    } | ({"head_dim": head_dim} if head_dim else {})
    return _facts({key: value for key, value in config.items() if value is not None})


def _gguf_head(file: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata (without arrays) and the shapes of the tensors, as the file has them: fastest dimension first."""
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensor_count, value_count = struct.unpack("<IQQ", file.read(20))
    if version < 2:
        raise ValueError(f"version {version} is too old")
    metadata = {}
    for _ in range(value_count):
        key = _gguf_string(file)
        (kind,) = struct.unpack("<I", file.read(4))
        metadata[key] = _gguf_value(file, kind)
    shapes = {}
    for _ in range(tensor_count):
        name = _gguf_string(file)
        (dimensions,) = struct.unpack("<I", file.read(4))
        shapes[name] = struct.unpack(f"<{dimensions}Q", file.read(8 * dimensions))
        file.read(12)
    return metadata, shapes


def _gguf_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8", "replace")


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _gguf_string(file)
    if kind == _GGUF_ARRAY:
        inner, length = struct.unpack("<IQ", file.read(12))
        if inner in (_GGUF_STRING, _GGUF_ARRAY):
            for _ in range(length):
                _gguf_value(file, inner)
        else:
            file.seek(_GGUF_SIZES[inner] * length, os.SEEK_CUR)
        return None
    return struct.unpack(_GGUF_FORMATS[kind], file.read(_GGUF_SIZES[kind]))[0]


# --- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataEstimate:
    """Lengths of the mixture's documents, estimated, and how each dataset was looked at."""

    lengths: LengthFacts
    notes: tuple[str, ...]


@dataclass
class _Mixture:
    documents: int = 0
    tokens: float = 0.0
    labelled: float = 0.0
    longest: int = 0
    notes: list[str] = field(default_factory=list)


def data_estimate(spec: FineTuneJobSpec, places: Sequence[Path]) -> DataEstimate:
    """Rows counted where the files are here, known or assumed elsewhere; tokens from characters. Never fails."""
    mixture, limit = _Mixture(), spec.training.max_sequence_length
    for dataset in spec.datasets:
        rows, mean, longest, note = _look_at(dataset, places)
        rows = min(rows, dataset.max_rows or rows)
        held_out = (spec.split.validation if dataset.splits.validation is None else 0.0) + (
            spec.split.test if dataset.splits.test is None else 0.0
        )
        rows = round(rows * (1 - held_out))
        drawn = max(1, round(dataset.weight * rows))
        mean = min(mean, limit)
        mixture.documents += drawn
        mixture.tokens += drawn * mean
        mixture.labelled += drawn * _labelled(dataset.task, mean)
        mixture.longest = max(mixture.longest, min(longest, limit))
        mixture.notes.append(f"{dataset.name}: {note}")
    lengths = LengthFacts(
        documents=mixture.documents,
        tokens=round(mixture.tokens),
        longest=mixture.longest,
        labelled=round(mixture.labelled),
    )
    return DataEstimate(lengths, tuple(mixture.notes))


def _labelled(task: Task | None, tokens: float) -> float:
    share = task.traits.trained_share if task else None
    return min(LABEL_TOKENS, tokens) if share is None else share * tokens


def _look_at(dataset: Dataset, places: Sequence[Path]) -> tuple[int, float, int, str]:
    """Training rows, mean and longest example in tokens, and how that is known."""
    known = KNOWN_DATASETS.get(dataset.repo or "")
    if known is not None and (rows := known.rows.get(dataset.splits.train)):
        tokens = known.characters / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
        return rows, tokens, round(2 * tokens), f"{rows:,} rows, as is known of {dataset.repo}"
    files = _files(_found(dataset.path, places)) if dataset.path is not None else []
    if files:
        return _measured(files, dataset)
    where = dataset.repo or dataset.path
    rows = dataset.max_rows or ASSUMED_ROWS
    note = f"{rows:,} rows of {ASSUMED_TOKENS} tokens are assumed, because {where} cannot be seen from here"
    return rows, ASSUMED_TOKENS, 4 * ASSUMED_TOKENS, note


def _files(path: Path) -> list[Path]:
    """The data files of a file or directory; those of other splits than train are left out."""
    if path.is_file():
        return [path] if path.suffix.lower() in _READERS else []
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in _READERS]
    train = [file for file in found if "train" in file.name.lower()]
    return train or [file for file in found if not any(word in file.name.lower() for word in ("test", "valid", "dev"))]


def _measured(files: list[Path], dataset: Dataset) -> tuple[int, float, int, str]:
    wanted = [name for name in dataset.columns.model_dump(exclude_none=True).values() if isinstance(name, str)]
    rows, sizes, labels = 0, list[int](), set[str]()
    for file in files:
        for number, row in enumerate(_READERS[file.suffix.lower()](file)):
            rows += 1
            if number < SAMPLED_ROWS:
                sizes.append(_characters(row, wanted))
                if isinstance(row, dict) and dataset.columns.label in row:
                    labels.add(str(row[dataset.columns.label]))
    if not sizes:
        return 1, 1.0, 1, "no rows were found"
    overhead = 0 if dataset.task and dataset.task.traits.form == "text" else TEMPLATE_TOKENS
    if dataset.template is None:  # the prompt names all labels
        overhead += round(sum(len(label) + 2 for label in labels) / CHARACTERS_PER_TOKEN)
    mean = sum(sizes) / len(sizes) / CHARACTERS_PER_TOKEN + overhead
    longest = round(max(sizes) / CHARACTERS_PER_TOKEN) + overhead
    note = f"{rows:,} rows counted, {mean:.0f} tokens each estimated from characters"
    if dataset.filter is not None:
        note += "; the filter is not carried out here"
    return rows, mean, max(1, longest), note


def _characters(row: Any, wanted: list[str]) -> int:
    """Characters of the wanted columns of a row, of all if none of them is there."""
    if isinstance(row, dict):
        chosen = [row[name] for name in wanted if name in row] or list(row.values())
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
    yield from islice(data, None)


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
