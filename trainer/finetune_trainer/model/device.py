"""What the device does fast: the choices behind `auto`, each with the reason for the report."""

from __future__ import annotations

import torch

from finetune_api.report import Choice, FailureClass
from finetune_trainer.failures import TrainerError


def choose_device(local_rank: int, gpus_per_node: int | None) -> torch.device:
    """This rank's GPU; the CPU if the node is to have none, or if that is unknown (None) and it has none.

    Raises TrainerError (crash: another node may work) if GPUs were requested and CUDA does not find them: training on
    the CPU would occupy them for weeks.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus_per_node == 0 or (gpus_per_node is None and not found):
        return torch.device("cpu")
    if gpus_per_node is not None and local_rank >= found:
        raise TrainerError(
            FailureClass.CRASH,
            f"This node should have {gpus_per_node} GPUs (topology.gpusPerNode), but CUDA finds {found}{_why_none()}. "
            "Check its driver and device plugin, or set topology.gpusPerNode to 0 to train on the CPU.",
            "topology.gpusPerNode",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _why_none() -> str:
    """The error with which CUDA fails to initialise; empty if it does not fail."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).strip().splitlines()[0].split('. ')[0]})"
    return ""


def choose_precision(requested: str, device: torch.device) -> tuple[torch.dtype, Choice]:
    """Data type of the products for the spec's `auto`, `bf16` or `fp32`.

    On a CPU without instructions for it bf16 is some 20 times slower than float32; with them 3 times faster
    (measured: AVX2 alone, AVX512-BF16). Nothing is timed, because all ranks must make the same choice.
    """
    if requested != "auto":
        return (torch.bfloat16 if requested == "bf16" else torch.float32), Choice(
            value=requested, why="set in the spec"
        )
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, Choice(value="bf16", why="the GPU supports it natively")
        return torch.float32, Choice(value="fp32", why="the GPU does not support bf16")
    if instructions := _bf16_instructions():
        return torch.bfloat16, Choice(value="bf16", why=f"the CPU has {instructions}")
    return torch.float32, Choice(value="fp32", why="the CPU has no bf16 instructions")


def _bf16_instructions() -> str:
    """The CPU's instructions for bf16 products; empty if it has none."""
    capabilities = torch.cpu.get_capabilities()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Armv8.6 BF16"}
    return next((spoken for name, spoken in known.items() if capabilities.get(name)), "")


def row_multiple(device: torch.device) -> int:
    """Packed rows are padded to a multiple of this many tokens: tensor cores compute in blocks."""
    return 8 if device.type == "cuda" else 1


def choose_compile(requested: bool | None, device: torch.device) -> tuple[bool, Choice]:
    """torch.compile layer by layer, for the spec's value or None for `auto`."""
    if requested is not None:
        return requested, Choice(value="on" if requested else "off", why="set in the spec")
    if device.type == "cuda":
        return True, Choice(value="on", why="fuses kernels on a GPU")
    return False, Choice(value="off", why="on a CPU compiling costs more than it saves")
