"""What a training knows besides its tensors: stored with every checkpoint. No random state: steps reseed themselves."""

from __future__ import annotations

import math

from pydantic import BaseModel

from finetune_trainer.train.spikes import SpikeState


class Best(BaseModel):
    """The step after which validation was best."""

    step: int
    loss: float


class TrainState(BaseModel):
    """Where a training stands after `step` steps; with the order of the examples, also the position in the data."""

    step: int = 0
    """Steps done: the next one has this number, counted from 0."""
    skipped: list[int] = []
    """Steps (counted from 0) that are left out because the loss spiked there."""
    rollbacks: int = 0
    """Spikes answered by going back."""
    spikes: SpikeState = SpikeState()
    """What the spike detector remembers."""
    best: Best | None = None
    """Best validation loss so far."""
    watched: float | None = None
    """Best value so far of the metric that early stopping watches (accuracy negated: less is better)."""
    stale_validations: int = 0
    """Validations in a row in which `watched` did not improve."""
    stopped_early: bool = False
    """Early stopping has ended the training."""

    def validated(self, loss: float, watched: float, patience: int | None) -> bool:
        """Take in a validation after `step` steps; whether its loss was the best so far.

        `watched` is what early stopping looks at, less is better. Values that are not finite are never better.
        """
        improved = math.isfinite(watched) and (self.watched is None or watched < self.watched)
        self.watched = watched if improved else self.watched
        self.stale_validations = 0 if improved else self.stale_validations + 1
        self.stopped_early = patience is not None and self.stale_validations >= patience
        better = math.isfinite(loss) and (self.best is None or loss < self.best.loss)
        if better:
            self.best = Best(step=self.step, loss=loss)
        return better
