"""The learning rate as a function of the step alone: nothing to store, nothing to restore. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

WSD_DECAY = 0.2
"""Share of the steps over which `wsd` decays (https://arxiv.org/abs/2405.18392)."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then the shape, which comes down to `minimum_ratio` of the peak after the last step."""

    kind: Literal["cosine", "linear", "constant", "wsd"]
    peak: float
    total: int
    warmup_ratio: float = 0.0
    minimum_ratio: float = 0.0

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: `ceil(ratio * total)`."""
        return math.ceil(self.warmup_ratio * self.total)

    def __call__(self, step: int) -> float:
        """Learning rate of the update number `step`, counted from 0: step 0 of w warm-up steps has peak / w."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * (self.minimum_ratio + (1 - self.minimum_ratio) * self._shape(step))

    def _shape(self, step: int) -> float:
        """1 at the first step after the warm-up; 0 would be reached by the step after the last."""
        done = self._share(step, self.warmup_steps)
        match self.kind:
            case "constant":
                return 1.0
            case "linear":
                return 1 - done
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done))
            case "wsd":
                decay_steps = math.ceil(WSD_DECAY * self.total)
                return 1 - self._share(step, max(self.warmup_steps, self.total - decay_steps))

    def _share(self, step: int, start: int) -> float:
        return min(1.0, max(0.0, (step - start) / (self.total - start)))
