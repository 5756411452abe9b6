"""The one all-reduce of a step: loss, gradient norm and the wishes of every rank.

Saving, stopping and failing are decided from the sum, which all ranks see alike: SIGTERM reaches one pod, clocks
differ, a disk is full on one node only. On GPUs the numbers are read one step late, so that the host never waits.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Wishes:
    """What one rank wants all ranks to do after this step."""

    stop: bool = False
    """It was told to end."""
    save: bool = False
    """A checkpoint is due by its clock."""
    failed: bool = False
    """Its last save failed."""


@dataclass(frozen=True)
class StepResult:
    """What came of one step, the same on all ranks."""

    step: int
    loss: float
    grad_norm: float
    wishes: Wishes

    @property
    def finite(self) -> bool:
        """Whether the update was carried out."""
        return math.isfinite(self.grad_norm)


class StepReduction:
    """Sums the numbers of a step over the ranks and hands them out `lag` steps later."""

    def __init__(self, device: torch.device, lag: int) -> None:
        self._device, self._lag = device, lag
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def reduce(self, step: int, loss: Tensor, squared_norm: Tensor, wishes: Wishes) -> Tensor:
        """Sum over the ranks; returns the squared gradient norm float64[] on the device. Collective."""
        own = torch.tensor([wishes.stop, wishes.save, wishes.failed], dtype=torch.float64)
        numbers = torch.cat([torch.stack([loss.double(), squared_norm]), own.to(self._device, non_blocking=True)])
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers)
        self._pending.append((step, *_to_host(numbers)))
        return numbers[1]

    def settled(self, all_of_them: bool = False) -> list[StepResult]:
        """Results that are due now, oldest first; with `all_of_them`, waits for the newest too."""
        results = []
        while len(self._pending) > (0 if all_of_them else self._lag):
            step, numbers, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            loss, squared_norm, *wishes = numbers.tolist()
            norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
            results.append(StepResult(step, loss, norm, Wishes(*(wish > 0 for wish in wishes))))
        return results


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if numbers.device.type != "cuda":
        return numbers.clone(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied
