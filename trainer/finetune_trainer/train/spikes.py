"""Detects that the loss has spiked, and which steps to skip. Pure, and small enough to be stored.

A step is suspicious if its loss or gradient norm is not finite, or its loss is far above those of the preceding
window. One hard batch is not a spike: several consecutive suspicious steps are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel

WINDOW = 16
"""Number of normal steps with which a loss is compared."""
FEWEST = 8
"""Number of normal steps before the first comparison."""
PATIENCE = 3
"""Consecutive suspicious steps that make a spike."""
THRESHOLD = 6.0
"""Standard deviations above the window's mean."""
MOST_ROLLBACKS = 2
"""Spikes that are answered with a rollback; the next one ends the training."""


@dataclass(frozen=True)
class Spike:
    """Steps first..last (counted from 0): the window and the suspicious ones after it, all to be skipped."""

    first: int
    last: int
    sentence: str


class SpikeState(BaseModel):
    """What the detector remembers: (step, loss) of the window, and the suspicious steps since."""

    window: list[tuple[int, float]] = []
    suspicious: list[int] = []


def observe(state: SpikeState, step: int, loss: float, grad_norm: float, warm: bool) -> tuple[SpikeState, Spike | None]:
    """The state after `step`, and the spike that it completes, if it does.

    Before the warm-up is over (`warm` false) only values that are not finite are suspicious.
    """
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite and not (warm and _far_above(loss, [seen for _, seen in state.window])):
        return SpikeState(window=[*state.window, (step, loss)][-WINDOW:]), None
    suspicious = [*state.suspicious, step]
    if len(suspicious) < PATIENCE:
        return SpikeState(window=state.window, suspicious=suspicious), None
    first = state.window[0][0] if state.window else suspicious[0]
    mean = _mean([seen for _, seen in state.window]) if state.window else math.nan
    what = f"loss {loss:.4g}, {mean:.4g} before" if finite else "loss or gradients are not finite"
    return state, Spike(first, step, f"{what}, for {len(suspicious)} consecutive steps up to step {step + 1}")


def _far_above(loss: float, window: list[float]) -> bool:
    """Whether the z-score is beyond the threshold; the deviation has a floor, for losses that barely vary."""
    if len(window) < FEWEST:
        return False
    mean = _mean(window)
    deviation = math.sqrt(_mean([(seen - mean) ** 2 for seen in window]))
    return loss > mean + THRESHOLD * max(deviation, 0.1 * abs(mean) + 0.05)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
