"""How ranks find each other: a store that is not open to the network unless ranks are on several machines.

PyTorch's store authenticates nobody, and whoever can write to it can redirect and end the ranks.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

LOOPBACK = "127.0.0.1"


def join_default_group(backend: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Join the default process group; addresses come from the environment (MASTER_ADDR, MASTER_PORT)."""
    here = os.environ.get("MASTER_ADDR") == LOOPBACK and os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
    store = None
    if world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
    elif here and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        store = _loopback_store(int(os.environ["MASTER_PORT"]), rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _loopback_store(port: int, rank: int, world_size: int, timeout: timedelta) -> Any:
    """A TCPStore that rank 0 serves on loopback only; left to itself, it listens on all addresses."""
    listener = socket.create_server((LOOPBACK, port)).detach() if rank == 0 else None
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    return store(LOOPBACK, port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listener)
