"""Several processes, each with a replica and a share of the rows; rank 0 puts the answers together."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finetune_trainer.process_group import join_default_group

LONGEST_WAIT = timedelta(days=2)
"""Ranks end at different times, so rank 0 waits for the slowest; a rank that dies ends the others at once."""


class Ranks:
    """The processes of this stage. A context manager: joins them at the start, leaves at the end."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._joined = False

    def __enter__(self) -> Ranks:
        if self.world_size > 1 and not dist.is_initialized():
            self._joined = True
            join_default_group("gloo", self.rank, self.world_size, LONGEST_WAIT)
        return self

    def __exit__(self, *_: object) -> None:
        if self._joined:
            dist.destroy_process_group()

    def share(self, sizes: list[int]) -> list[int]:
        """Indices of this rank's rows: dealt out by size, so that all ranks compute about as much."""
        return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[self.rank :: self.world_size]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0)
        return gathered or []
