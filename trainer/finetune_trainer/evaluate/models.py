"""The exported model as a user would load it, and what it started from, one in memory at a time.

Where the export is an adapter, both are the same weights with the adapter on and off. Nothing of the trainer's own
model code is used: what is measured is what `from_pretrained` gives.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from finetune_api.traits import Method
from finetune_trainer.data.manifest import PreparedManifest, PreparedModel
from finetune_trainer.files import ADAPTER_CONFIG

Variant = Literal["base", "tuned"]

STARTING_ADAPTER = "start"
HEADROOM = 0.85
"""Share of a device's memory that the weights may take before the model is spread over the node's devices."""


@dataclass(frozen=True)
class ModelPair:
    """Everything that decides which two models are compared, and how they are held."""

    export: Path
    base: PreparedModel
    method: Method
    dtype: torch.dtype
    device: torch.device
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    compute_dtype: torch.dtype
    """Of the products with a 4-bit base."""
    trust_remote_code: bool = False
    device_map: str | None = None
    """`auto` where the weights do not fit on one device."""

    @property
    def is_adapter(self) -> bool:
        return (self.export / ADAPTER_CONFIG).exists()

    @property
    def base_directory(self) -> Path:
        """What the adapter is loaded on: the 4-bit copy if it was trained on that."""
        quantised = self.is_adapter and self.method.traits.four_bit and self.base.nf4_directory
        return Path(quantised if quantised else self.base.directory)


@contextmanager
def opened(pair: ModelPair, variant: Variant) -> Iterator[Any]:
    """One of the two models, in evaluation mode. Its memory is given back at the end.

    To measure both, take `opened_both`: an adapter's base is then loaded once.
    """
    model = _tuned(pair) if variant == "tuned" else _base(pair)
    try:
        yield model
    finally:
        del model
        _free()


def opened_both(pair: ModelPair, *, base: bool) -> Iterator[tuple[Variant, Any]]:
    """The tuned model, then (if asked) the base: at most one set of base weights in memory at any time."""
    if not pair.is_adapter:
        with opened(pair, "tuned") as model:
            yield "tuned", model
        if base:
            with opened(pair, "base") as model:
                yield "base", model
        return
    with opened(pair, "tuned") as model:
        yield "tuned", model
        if base and pair.base.adapter_directory:
            model.load_adapter(pair.base.adapter_directory, adapter_name=STARTING_ADAPTER)
            model.set_adapter(STARTING_ADAPTER)
            yield "base", model.eval()
        elif base and model.active_peft_config.is_prompt_learning:
            yield "base", model.get_base_model()  # its weights and methods are untouched
        elif base:
            with model.disable_adapter():
                yield "base", model


def _tuned(pair: ModelPair) -> Any:
    if not pair.is_adapter:
        return _prepared(_load(pair, pair.export), pair)
    return _prepared(PeftModel.from_pretrained(_load(pair, pair.base_directory), str(pair.export)), pair)


def _base(pair: ModelPair) -> Any:
    model = _load(pair, pair.base_directory)
    if pair.base.adapter_directory:
        model = PeftModel.from_pretrained(model, pair.base.adapter_directory)
    return _prepared(model, pair)


def _load(pair: ModelPair, directory: Path) -> Any:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=pair.trust_remote_code)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        quantization["bnb_4bit_compute_dtype"] = str(pair.compute_dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=pair.dtype,
        device_map=pair.device_map or {"": str(pair.device)},
        trust_remote_code=pair.trust_remote_code,
        use_safetensors=True,
    )
    if quantization is not None:
        from finetune_trainer.model.nf4 import keep_unpacked

        keep_unpacked(model)
    return model


def _prepared(model: Any, pair: ModelPair) -> Any:
    """Greedy decoding and nothing else: no sampling, penalty or stop word of a generation config takes part."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(pair.end_token_ids), pad_token_id=pair.pad_token_id
    )
    model.generation_config = inner.generation_config
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_side_by_side)
    return model.eval().requires_grad_(False)


def _side_by_side(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last positions of a batch's rows lie apart in memory: PyTorch would copy the head once for each row."""
    return (inputs[0].contiguous(), *inputs[1:])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits_on_one_device(directory: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights of a model directory fit on the device; always true for the CPU."""
    if device.type != "cuda":
        return True
    return _weight_bytes(directory, dtype) <= HEADROOM * torch.cuda.get_device_properties(device).total_memory


def _weight_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of the safetensors files, floating-point values counted in `dtype`."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened_file:
            header = json.loads(opened_file.read(int.from_bytes(opened_file.read(8), "little")))
        header.pop("__metadata__", None)
        for tensor in header.values():
            start, end = tensor["data_offsets"]
            floating = tensor["dtype"] in ("F32", "F16", "BF16", "F64")
            values = 1
            for size in tensor["shape"]:
                values *= size
            total += values * dtype.itemsize if floating else end - start
    return total


def model_pair(
    manifest: PreparedManifest, export: Path, method: Method, dtype: torch.dtype, device: torch.device, **rest: Any
) -> ModelPair:
    """The models of an export of a run whose preparation is described by `manifest`."""
    return ModelPair(
        export=export,
        base=manifest.model,
        method=method,
        dtype=dtype,
        device=device,
        end_token_ids=tuple(manifest.end_token_ids),
        pad_token_id=manifest.pad_token_id,
        **rest,
    )
