"""QLoRA's 4-bit base: written once by Prepare, tensor by tensor; read by every rank in slices.

The copy is in bitsandbytes' own serialised form with its quantisation in `config.json`, so that transformers loads it
as a 4-bit model too. Storage is uint8: 16-bit storage may be altered by all-gathers that normalise NaNs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune_api.report import FailureClass
from finetune_api.spec import Quantization
from finetune_trainer.failures import TrainerError
from finetune_trainer.model.weights import ModelWeights, SafetensorsDirectory, empty_model, read_config
from finetune_trainer.model.writer import ShardWriter

BLOCK_SIZE = 64


def quantization_key(commit_or_digest: str, quantization: Quantization) -> str:
    """Name of the copy in the cache: the model's commit (or digest) and what decides the bytes."""
    parts = [commit_or_digest, quantization.type, str(quantization.double_quant), str(BLOCK_SIZE), "uint8"]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def refuse_quantized(directory: Path, trust_remote_code: bool = False) -> None:
    """Raise TrainerError (bad-spec) for a model that is already quantised."""
    config = read_config(directory, trust_remote_code)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized.quant_method
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"The model is already quantised ({method}) and cannot be tuned. "
            "Use the unquantised model; tuning.method: qlora quantises it.",
            "model",
        )


def refuse_saving_quantized(model: nn.Module, modules_to_save: list[str]) -> None:
    """Raise TrainerError (bad-spec) if a module that is to be trained whole lies in 4 bits."""
    for name in modules_to_save:
        if any(module == name or module.endswith(f".{name}") for module in quantized_modules(model)):
            raise TrainerError(
                FailureClass.BAD_SPEC,
                f"{name} is stored in 4 bits and cannot be trained whole: remove it from modulesToSave, or use lora.",
                "tuning.lora.modulesToSave",
            )


def is_router(linear: nn.Linear) -> bool:
    """Whether a linear layer of an empty model gives more than a product, as Llama 4's router does."""
    if type(linear).forward is nn.Linear.forward or hasattr(linear, "quant_state"):
        return False
    return not isinstance(linear(linear.weight.new_empty(1, linear.in_features)), Tensor)


def quantized_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are stored in 4 bits, by name: all but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def write_nf4_copy(
    model_dir: Path, out_dir: Path, quantization: Quantization, tick: Callable[[int], None] = lambda count: None
) -> None:
    """Write the 4-bit copy of `model_dir` to `out_dir` (made; replaced if there), one tensor in memory at a time.

    Linear layers but the head are quantised in blocks of 64 from the file's own data type; the rest is copied.
    The caller publishes the directory (rename) once this returns. `tick` is told of every tensor.
    """
    refuse_quantized(model_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    model = empty_model(read_config(model_dir), torch.bfloat16)
    modules = quantized_modules(model)
    router = next((name for name, module in modules.items() if is_router(module)), None)
    if router or not modules:
        why = f"{router} is a router, which 4 bits do not support" if router else "it has no linear layers"
        raise TrainerError(
            FailureClass.BAD_SPEC, f"qlora cannot be used for this model: {why}. Use lora.", "tuning.method"
        )
    quantized = {f"{name}.weight" for name in modules}
    writer = ShardWriter(out_dir)
    with SafetensorsDirectory(model_dir) as directory:
        weights = ModelWeights(directory, model)
        for name in weights.names():
            tensor = weights.read(name)
            if name in quantized:
                for key, value in quantize(tensor, quantization).items():
                    writer.add(f"{name}{key}", value)
            else:
                writer.add(name, tensor)
            tick(1)
    writer.close()
    _write_config(model_dir, out_dir, quantization)


def quantize(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """bitsandbytes' serialised form of a matrix: `""` for the packed bytes, `.absmax` and others for its state."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
        quant_storage=torch.uint8,
    )
    return {"": packed} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}


def _write_config(model_dir: Path, out_dir: Path, quantization: Quantization) -> None:
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quantization.type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16" if quantization.compute_dtype == "auto" else quantization.compute_dtype,
    }
    (out_dir / "config.json").write_text(json.dumps(config, indent=1))
    generation = model_dir / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, out_dir / generation.name)


# --- in the model ----------------------------------------------------------------------------------------------------


def make_linear_4bit(model: nn.Module, quantization: Quantization, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of an empty model by bitsandbytes' 4-bit ones, still empty and still unpacked.

    PEFT reads shapes from the unpacked weight while adapters are attached; `pack_empty` follows.
    """
    from bitsandbytes.nn import Linear4bit

    for name, linear in quantized_modules(model).items():
        with torch.device("meta"):
            replacement = Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype,
                quantization.double_quant,
                quantization.type,
            )
            weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=linear.weight.dtype), requires_grad=False)
        weight.compress_statistics = quantization.double_quant  # type: ignore[attr-defined]
        weight.quant_type = quantization.type  # type: ignore[attr-defined]
        replacement.weight = weight
        replacement.bias = linear.bias
        model.set_submodule(name, replacement)
    keep_unpacked(model)


def keep_unpacked(model: nn.Module) -> None:
    """Let 4-bit layers compute in evaluation what they compute in training.

    On CPUs with AVX512-BF16 bitsandbytes would repack the weight in place for a bfloat16 kernel: fatal for a view
    of a gathered buffer, less exact than float32, and an error for sizes that are no multiple of its block.
    """
    for module in linear_4bit(model).values():
        module.support_avx512bf16_for_cpu = False


def pack_empty(model: nn.Module) -> None:
    """Give the 4-bit layers of an empty model weights of the packed shape, uint8[numel / 2, 1]."""
    for module in linear_4bit(model).values():
        packed = torch.empty((module.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        module.weight = nn.Parameter(packed, requires_grad=False)


def linear_4bit(model: nn.Module) -> dict[str, Any]:
    """The 4-bit layers by name."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def read_states(model: nn.Module, directory: SafetensorsDirectory, device: torch.device) -> None:
    """Give each 4-bit layer its quantisation state, whole on every rank; `name` is that of the base model."""
    from bitsandbytes.functional import QuantState

    states: dict[str, dict[str, Tensor]] = {}
    for key in directory:
        name, marker, rest = key.partition(".weight.")
        if marker:
            states.setdefault(name, {})[rest] = directory.read(key)
    for name, module in linear_4bit(model).items():
        module.quant_state = QuantState.from_dict(states[name.removesuffix(".base_layer")], device=device)


def dequantized(module: Any, packed: Tensor) -> Tensor:
    """The matrix of a 4-bit layer from its whole packed weight."""
    from bitsandbytes.functional import dequantize_4bit

    matrix: Tensor = dequantize_4bit(packed, module.quant_state)
    return matrix
