"""What the files of a model say of other files, checked before a library acts on it.

A model repository is written by strangers. transformers hands what tokenizer_config.json says to the tokenizer as
arguments, some of which it opens when they are text; an index of weights names the files to read. Neither may lead
out of the model's own directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError

TOKENIZER_ARGUMENTS = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
"""Files whose values become arguments of the tokenizer."""
INLINE = frozenset({"vocab", "merges"})
"""Arguments that are tables; text in their place is opened as a file."""
NAMES_OF_ORIGIN = frozenset({"name_or_path", "_name_or_path"})
"""Where the files came from; read by nobody."""
LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors file's header, as the library has it."""


def check_model_files(directory: Path) -> None:
    """Raise TrainerError (bad-spec) if a file of this model would have a library read files of somebody else."""
    for name in TOKENIZER_ARGUMENTS:
        for key, value in _texts(_read(directory / name)):
            if key in INLINE or (key not in NAMES_OF_ORIGIN and _leads_out(directory, value)):
                raise _refused(f"{name} names a file outside the model ({key}: {value[:200]!r})")
    for path in sorted(directory.glob("*.index.json")):
        check_weight_map(path.name, _read(path).get("weight_map"))


def check_weight_map(name: str, weight_map: Any) -> dict[str, str]:
    """The file of each tensor by an index. Raises TrainerError (bad-spec) unless all lie beside the index `name`."""
    if not isinstance(weight_map, dict):
        raise _refused(f"{name} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise _refused(f"{name} names {str(file)[:200]!r}, which is no safetensors file beside it")
    return weight_map


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file, by its header. Raises TrainerError (bad-spec) without one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, path.stat().st_size):
            raise _refused(f"{path.name} is no safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _refused(f"the header of {path.name} is not JSON") from error
    if not isinstance(header, dict):
        raise _refused(f"the header of {path.name} is not a JSON object")
    shapes: dict[str, list[int]] = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
            raise _refused(f"the header of {path.name} gives the tensor {name[:100]!r} no shape")
        shapes[name] = shape
    return shapes


def _texts(arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Arguments that are text; tokenizer.json has them in `model`."""
    inner = arguments.get("model")
    for values in (arguments, inner if isinstance(inner, dict) else {}):
        yield from ((key, value) for key, value in values.items() if isinstance(value, str))


def _leads_out(directory: Path, value: str) -> bool:
    """Whether a text is the path of a file here that is not one of the model's."""
    if not value or len(value) > 4096 or "\n" in value or "\0" in value:
        return False
    model = directory.absolute()
    beside, here = (Path(os.path.normpath(start / value)) for start in (model, Path.cwd()))
    if model in beside.parents and beside.is_file():
        return False
    return any(path.is_file() and model not in path.parents for path in (beside, here))


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise _refused(f"{path.name} is not JSON") from error
    if not isinstance(content, dict):
        raise _refused(f"{path.name} is not a JSON object")
    return content


def _refused(why: str) -> TrainerError:
    return TrainerError(FailureClass.BAD_SPEC, f"The model cannot be used: {why}.", "model")


def refuse_without_attention(config: Any) -> None:
    """Raise TrainerError (bad-spec) for the config of a model that is no transformer."""
    if not getattr(config.get_text_config(), "num_attention_heads", None):
        sentence = f"{config.model_type} has no attention layers; only transformers can be tuned."
        raise TrainerError(FailureClass.BAD_SPEC, sentence, "model")
