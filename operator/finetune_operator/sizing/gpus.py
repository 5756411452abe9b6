"""Types of GPU by name: memory, speed and whether they compute bf16, from the vendor's data sheets.

Memory is what a program sees (`torch.cuda.mem_get_info`), which is less than the name says; speed is the dense
matrix rate with float32 accumulation, without sparsity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_operator import devices

GIB = 1 << 30


@dataclass(frozen=True)
class GpuType:
    """One type of GPU."""

    name: str
    memory_bytes: int
    flops: float
    """Dense matrix operations per second: bf16, or fp32 where there is no bf16."""
    bf16: bool = True


def _gpu(name: str, memory_gib: float, teraflops: float, *, bf16: bool = True) -> GpuType:
    return GpuType(name, int(memory_gib * GIB), teraflops * 1e12, bf16)


GPUS: tuple[GpuType, ...] = (
    _gpu("A100-40GB", 39.4, 312),
    _gpu("A100-80GB", 79.2, 312),
    _gpu("H100-80GB", 79.1, 989),
    _gpu("H100-PCIe-80GB", 79.1, 756),
    _gpu("H100-NVL-94GB", 93.1, 835),
    _gpu("H200-141GB", 139.8, 989),
    _gpu("GH200-96GB", 94.5, 989),
    _gpu("B200-180GB", 178.3, 2250),
    _gpu("L4-24GB", 22.0, 121),
    _gpu("L40-48GB", 44.4, 181),
    _gpu("L40S-48GB", 44.4, 362),
    _gpu("A10-24GB", 22.0, 125),
    _gpu("A10G-24GB", 22.0, 70),
    _gpu("A40-48GB", 44.4, 150),
    _gpu("RTX-A5000-24GB", 23.6, 111),
    _gpu("RTX-A6000-48GB", 47.4, 155),
    _gpu("RTX-6000-Ada-48GB", 47.4, 364),
    _gpu("RTX-3090-24GB", 23.6, 71),
    _gpu("RTX-4090-24GB", 23.5, 165),
    _gpu("RTX-5090-32GB", 31.3, 210),
    _gpu("V100-16GB", 15.8, 15.7, bf16=False),
    _gpu("V100-32GB", 31.7, 15.7, bf16=False),
    _gpu("T4-16GB", 14.6, 8.1, bf16=False),
)

_NOISE = {"NVIDIA", "TESLA", "GEFORCE", "QUADRO", "SXM", "SXM2", "SXM3", "SXM4", "SXM5", "HBM3", "HBM2E", "GENERATION"}


def find_gpu(text: str) -> GpuType | None:
    """The type that a name means: `A100-80GB`, `NVIDIA-A100-SXM4-80GB`, `nvidia-h100`, `NVIDIA L4`. None if unknown.

    A name without a size means the smallest of that model, so that a plan never promises too much.
    """
    words = _words(text)
    found = [gpu for gpu in GPUS if _words(gpu.name) == words or _model(gpu) == words]
    if not found:
        found = [gpu for gpu in GPUS if _model(gpu) <= words and _size(words) in (None, _size(_words(gpu.name)))]
        most = max((len(_model(gpu)) for gpu in found), default=0)
        found = [gpu for gpu in found if len(_model(gpu)) == most]
    return min(found, key=lambda gpu: gpu.memory_bytes, default=None)


def gpu_here(gpu: devices.Gpu) -> GpuType | None:
    """The type of a GPU of this machine, with no more memory than its driver reports. None if unknown."""
    known = find_gpu(gpu.name)
    if known is None or gpu.memory_bytes is None:
        return known
    return replace(known, memory_bytes=min(known.memory_bytes, gpu.memory_bytes))


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU has instructions for bf16 products, in which the trainer then computes."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})


def _words(text: str) -> frozenset[str]:
    words = [word for word in re.split(r"[^A-Z0-9]+", text.upper()) if word and word not in _NOISE]
    return frozenset(re.sub(r"^(\d+)G(I?B)?$", r"\1GB", word) for word in words)


def _model(gpu: GpuType) -> frozenset[str]:
    return frozenset(word for word in _words(gpu.name) if not _is_size(word))


def _size(words: frozenset[str]) -> str | None:
    return next((word for word in words if _is_size(word)), None)


def _is_size(word: str) -> bool:
    return re.fullmatch(r"\d+GB", word) is not None
