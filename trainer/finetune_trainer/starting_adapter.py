"""An adapter to go on from: what PEFT would start from that training here would not is refused by name.

Without torch, so that Prepare can tell before a GPU is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune_trainer.untrusted import tensor_shapes

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is."""
SUPPORTED = {
    *("peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "lora_dropout", "fan_in_fan_out", "bias", "lora_bias"),
    *("use_rslora", "use_dora", "target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "lora_ga_config"),
}
"""Fields of adapter_config.json that training goes on with, or that decide nothing; any other must be unset."""
_ROWS_AT_A_TIME = 4096
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_adapter_config(directory: Path) -> dict[str, Any] | None:
    """The adapter's config; None where it is no JSON object."""
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def refuse_other_starts(directory: Path) -> None:
    """Raise TrainerError (bad-spec) for an adapter with which PEFT would not start where training here would."""
    config = read_adapter_config(directory) or {}
    init = config.get("init_lora_weights")
    if init not in PLAIN_STARTS:
        raise _refused(
            f"it was made with init_lora_weights {str(init)[:50]!r}, which changes the base model too. Save it with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    unknown = sorted(name for name, value in config.items() if name not in SUPPORTED and value)
    if unknown:
        raise _refused(f"its {ADAPTER_CONFIG} sets {', '.join(unknown)[:200]}, which is not supported here")


def refuse_merging_biases(directory: Path) -> None:
    """Raise TrainerError (bad-spec) for biases of its own, which the base's layers have no place for."""
    if (read_adapter_config(directory) or {}).get("lora_bias"):
        raise TrainerError(
            FailureClass.BAD_SPEC,
            "The adapter to go on from has biases (lora_bias), which cannot be merged. Set publish.format: adapter.",
            "publish.format",
        )


def refuse_other_base_weights(directory: Path, base: Path) -> None:
    """Raise TrainerError (bad-spec) if the adapter's file also holds weights of the base, such as embeddings, other
    than the base's own: PEFT would start from them, but nothing would train or export them."""
    files = [path for path in sorted(base.glob("*.safetensors")) if path.is_file()]
    shapes = {path: tensor_shapes(path) for path in files}
    own = tensor_shapes(directory / ADAPTER_WEIGHTS)
    for key in _untrained(directory, own):
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        found = [(path, other) for path, names in shapes.items() for other in names if _same(other, name, shapes)]
        same_shape = bool(found) and own[key] == shapes[found[0][0]][found[0][1]]
        if not same_shape or not _equal(directory / ADAPTER_WEIGHTS, key, *found[0]):
            raise _refused(
                f"its file holds {key}, other than the model's {name} (trained whole, resized, or saved with "
                "save_embedding_layers), which would be lost. Merge the adapter and use the result as the model"
            )


def _untrained(directory: Path, names: Iterable[str]) -> list[str]:
    """Tensors of the adapter's file that are neither low-rank factors nor trained whole with it."""
    config = read_adapter_config(directory) or {}
    saved = [f".{name}." for name in config.get("modules_to_save") or []]
    biases = config.get("bias", "none") != "none"
    return [
        key
        for key in names
        if ".lora_" not in key
        and not any(name in f".{key}" for name in saved)
        and not (biases and key.endswith(".bias"))
    ]


def _same(other: str, name: str, shapes: dict[Path, dict[str, list[int]]]) -> bool:
    """Whether a tensor of the base is the one of that name; a tied head is the embedding."""
    if other == name:
        return True
    tied = name == "lm_head.weight" and not any(name in names for names in shapes.values())
    return tied and other.endswith("embed_tokens.weight")


def _equal(one: Path, key: str, other: Path, name: str) -> bool:
    try:
        return all(np.array_equal(a, b) for a, b in zip(_rows(one, key), _rows(other, name), strict=True))
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise _refused(f"{key} cannot be read ({error})") from error


def _rows(path: Path, name: str) -> Iterator[NDArray[np.float32]]:
    """The tensor in float32, some rows at a time."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(length))[name]
    kind = _TYPES.get(tensor["dtype"])
    if kind is None:
        raise _refused(f"its file holds {name} as {tensor['dtype']}, which no model here has")
    offset, shape = 8 + length + tensor["data_offsets"][0], tuple(tensor["shape"])
    values = np.memmap(path, dtype=kind, mode="r", offset=offset, shape=shape)
    for start in range(0, shape[0], _ROWS_AT_A_TIME):
        rows = values[start : start + _ROWS_AT_A_TIME]
        yield (rows.astype(np.uint32) << 16).view(np.float32) if kind is np.uint16 else rows.astype(np.float32)


def _refused(why: str) -> TrainerError:
    return TrainerError(FailureClass.BAD_SPEC, f"The adapter cannot be trained further: {why}.", "model.adapter")
