"""What this device does fast: the choices behind every `auto`, each with its reason for the report."""

from __future__ import annotations

import torch

from finetune_api.report import Choice


def choose_precision(requested: str, device: torch.device) -> tuple[torch.dtype, Choice]:
    """Data type of the products for the spec's `auto`, `bf16` or `fp32`.

    On a CPU without instructions for it bf16 is some 20 times slower than float32; with them 3 times faster
    (measured: AVX2 alone, AVX512-BF16). Flags are asked, nothing is timed: all ranks must choose alike.
    """
    if requested != "auto":
        return (torch.bfloat16 if requested == "bf16" else torch.float32), Choice(
            value=requested, why="as the spec says"
        )
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, Choice(value="bf16", why="the GPU computes it natively")
        return torch.float32, Choice(value="fp32", why="the GPU has no bf16")
    if instructions := _bf16_instructions():
        return torch.bfloat16, Choice(value="bf16", why=f"the CPU has {instructions}")
    return torch.float32, Choice(value="fp32", why="the CPU has no instructions for bf16")


def _bf16_instructions() -> str:
    """The CPU's instructions for bf16 products; empty if it has none."""
    capabilities = torch.cpu.get_capabilities()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Armv8.6 BF16"}
    return next((spoken for name, spoken in known.items() if capabilities.get(name)), "")


def choose_compile(requested: bool | None, device: torch.device) -> tuple[bool, Choice]:
    """torch.compile layer by layer, for the spec's value or None for `auto`."""
    if requested is not None:
        return requested, Choice(value="on" if requested else "off", why="as the spec says")
    if device.type == "cuda":
        return True, Choice(value="on", why="fuses kernels on a GPU")
    return False, Choice(value="off", why="on a CPU it costs more to compile than it saves")
