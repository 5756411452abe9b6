"""What a training knows besides its tensors: stored with every checkpoint. No random state: steps reseed themselves."""

from __future__ import annotations

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
