"""What this machine has: GPUs (without torch), cores, memory. Only reads; decides nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """One GPU as CUDA_VISIBLE_DEVICES names it."""

    id: str
    name: str = ""
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Machine:
    """What the processes of a job may use."""

    gpus: tuple[Gpu, ...] = ()
    cores: int = 1
    memory_bytes: int = 1 << 40


def this_machine() -> Machine:
    """GPUs that CUDA_VISIBLE_DEVICES leaves visible, cores and memory within the cgroup's limits."""
    return Machine(
        gpus=visible(detect_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")), cores=cores(), memory_bytes=memory()
    )


def visible(gpus: tuple[Gpu, ...], allowed: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a CUDA_VISIBLE_DEVICES value names, in its order; an unknown one ends the list."""
    if allowed is None:
        return gpus
    chosen: list[Gpu] = []
    for name in (part.strip() for part in allowed.split(",")):
        match = [gpu for i, gpu in enumerate(gpus) if name and (gpu.id.startswith(name) or str(i) == name)]
        if not match and not name.startswith("MIG-"):
            break
        # The name is kept as it was given: CUDA may number the GPUs in another order than the driver.
        chosen.append(replace(match[0], id=name) if match else Gpu(name))
    return tuple(chosen)


def detect_gpus() -> tuple[Gpu, ...]:
    """All NVIDIA GPUs that the driver (NVML) names; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    import pynvml

    try:
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        gpu = Gpu(pynvml.nvmlDeviceGetUUID(device), pynvml.nvmlDeviceGetName(device))
    except pynvml.NVMLError:  # lost, or another container's
        return Gpu(str(index))
    try:
        return replace(gpu, memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(device).total)
    except pynvml.NVMLError:  # it shares the memory of its CPU
        return gpu


def cores() -> int:
    """Cores this process may use: its affinity, within the cgroup's quota."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:
        available = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        available = min(available, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, available)


def memory() -> int:
    """Bytes of memory this process may use: the machine's, within the cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def loopback_interface() -> str:
    """Name of the interface of 127.0.0.1, for gloo and NCCL: nothing then listens to the network."""
    return "lo0" if os.uname().sysname == "Darwin" else "lo"
