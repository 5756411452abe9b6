"""Process group, device mesh and determinism; the same under torchrun, under accelerate and in a single process."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from finetune_trainer.process_group import join_default_group


def init_distributed(device: torch.device, rank: int, world_size: int, timeout_seconds: float) -> dist.ProcessGroup:
    """Join the default group (NCCL for GPU tensors, gloo for the rest); returns a gloo group for checkpoints.

    The timeout must be longer than the watchdog's, whose message says more.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    join_default_group(backend, rank, world_size, timeout)
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def build_mesh(device: torch.device, world_size: int, ranks_per_node: int, hybrid: bool) -> DeviceMesh | None:
    """Over which ranks parameters are sharded: [ranks], [nodes, ranks per node] for hybrid, None for one rank."""
    if world_size == 1:
        return None
    nodes = world_size // ranks_per_node
    if hybrid and nodes > 1:
        return init_device_mesh(device.type, (nodes, ranks_per_node), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))


def set_determinism() -> None:
    """Use only kernels with reproducible results; an operation without one raises an error that names it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
