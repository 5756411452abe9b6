"""The state of training besides its tensors, stored with every checkpoint. No random state: every step reseeds."""

from __future__ import annotations

import math

from pydantic import BaseModel

from finetune_trainer.train.spikes import SpikeState


class Best(BaseModel):
    """The step after which validation was best."""

    step: int
    loss: float


class TrainState(BaseModel):
    """The state after `step` steps, which also give the position in the data."""

    step: int = 0
    """Steps done; the number of the next one, counted from 0."""
    skipped: list[int] = []
    """Steps (counted from 0) that are skipped because the loss spiked there."""
    rollbacks: int = 0
    """Spikes after which an earlier checkpoint was restored."""
    spikes: SpikeState = SpikeState()
    """What the spike detector remembers."""
    best: Best | None = None
    """Best validation loss so far."""
    watched: float | None = None
    """Best value so far of the metric that early stopping watches (accuracy is negated: lower is better)."""
    stale_validations: int = 0
    """Consecutive validations in which `watched` did not improve."""
    stopped_early: bool = False
    """Early stopping has ended the training."""

    def record_validation(self, loss: float, watched: float, patience: int | None) -> bool:
        """Record a validation after `step` steps; returns whether its loss is the best so far.

        `watched` is the value that early stopping watches, lower is better. Non-finite values are never better.
        """
        improved = math.isfinite(watched) and (self.watched is None or watched < self.watched)
        self.watched = watched if improved else self.watched
        self.stale_validations = 0 if improved else self.stale_validations + 1
        self.stopped_early = patience is not None and self.stale_validations >= patience
        better = math.isfinite(loss) and (self.best is None or loss < self.best.loss)
        if better:
            self.best = Best(step=self.step, loss=loss)
        return better
