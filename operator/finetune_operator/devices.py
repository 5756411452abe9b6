"""What this machine has: GPUs (without torch), cores, memory. Reads only; decides nothing."""

from __future__ import annotations

import ctypes
import os
import subprocess
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
    """The GPUs named by a CUDA_VISIBLE_DEVICES value, in its order; an unknown name hides it and all after it."""
    if allowed is None:
        return gpus
    chosen: list[Gpu] = []
    for name in (part.strip() for part in allowed.split(",")):
        match = [gpu for i, gpu in enumerate(gpus) if name and (gpu.id.startswith(name) or str(i) == name)]
        if not match and not name.startswith("MIG-"):
            break
        # Its own words are kept: CUDA may count in another order than the driver.
        chosen.append(replace(match[0], id=name) if match else Gpu(name))
    return tuple(chosen)


def detect_gpus() -> tuple[Gpu, ...]:
    """All NVIDIA GPUs: by NVML, else by nvidia-smi, else by the driver's directory in /proc."""
    for way in (_from_nvml, _from_smi, _from_proc):
        try:
            if gpus := way():
                return gpus
        except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
            continue
    return ()


class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _from_nvml() -> tuple[Gpu, ...]:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        return tuple(_nvml_device(nvml, index) for index in range(count.value))
    finally:
        nvml.nvmlShutdown()


def _nvml_device(nvml: ctypes.CDLL, index: int) -> Gpu:
    device, memory_info = ctypes.c_void_p(), _NvmlMemory()
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return Gpu(str(index))
    nvml.nvmlDeviceGetName(device, name, 96)
    nvml.nvmlDeviceGetUUID(device, uuid, 96)
    known = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory_info)) == 0
    return Gpu(uuid.value.decode() or str(index), name.value.decode(), memory_info.total if known else None)


def _from_smi() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    return tuple(parse_smi(line) for line in lines if line.strip())


def parse_smi(line: str) -> Gpu:
    """One line of nvidia-smi's CSV: `GPU-…, NVIDIA A100-SXM4-80GB, 81920` (MiB)."""
    uuid, name, mebibytes = (part.strip() for part in line.split(","))
    return Gpu(uuid, name, int(mebibytes) << 20 if mebibytes.isdigit() else None)


def _from_proc(directory: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[Gpu, ...]:
    return tuple(Gpu(str(index)) for index, _ in enumerate(sorted(directory.iterdir())))


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
