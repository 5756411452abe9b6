"""The one all-reduce of a step: loss, gradient norm and the flags of every rank.

Saving, stopping and failing are decided from the sum, which is the same on all ranks: SIGTERM reaches one pod, clocks
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
class StepFlags:
    """What one rank asks of all ranks after this step."""

    stop: bool = False
    """This rank received SIGTERM or SIGINT."""
    save: bool = False
    """A checkpoint is due by this rank's clock."""
    failed: bool = False
    """This rank's last save failed."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step, the same on all ranks."""

    step: int
    tokens: int
    """Tokens of the step's examples on all ranks, without padding."""
    computed_tokens: int
    """Those of them that were computed: fewer where examples share prefixes."""
    loss: float
    grad_norm: float
    flags: StepFlags

    @property
    def finite(self) -> bool:
        """Whether the update was applied."""
        return math.isfinite(self.grad_norm)


class StepReduction:
    """Sums the numbers of a step over the ranks and hands them out `lag` steps later."""

    def __init__(self, device: torch.device, lag: int) -> None:
        self._device, self._lag = device, lag
        self._pending: deque[tuple[tuple[int, int, int], Tensor, torch.cuda.Event | None]] = deque()

    def reduce(
        self, step: int, loss: Tensor, squared_norm: Tensor, flags: StepFlags, tokens: int, computed_tokens: int
    ) -> Tensor:
        """Sum over the ranks; returns the squared gradient norm float64[] on the device. Collective.

        The two numbers of tokens, equal on all ranks, are handed back with the step's result.
        """
        own = torch.tensor([flags.stop, flags.save, flags.failed], dtype=torch.float64)
        numbers = torch.cat([torch.stack([loss.double(), squared_norm]), own.to(self._device, non_blocking=True)])
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers)
        self._pending.append(((step, tokens, computed_tokens), *_to_host(numbers)))
        return numbers[1]

    def settled(self, all_of_them: bool = False) -> list[StepResult]:
        """Results that are due now, oldest first; with `all_of_them`, the newest too, which are waited for."""
        results = []
        while len(self._pending) > (0 if all_of_them else self._lag):
            known, numbers, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            loss, squared_norm, *flags = numbers.tolist()
            norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
            results.append(StepResult(*known, loss, norm, StepFlags(*(flag > 0 for flag in flags))))
        return results


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if numbers.device.type != "cuda":
        return numbers.clone(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied
