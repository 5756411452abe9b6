"""What training minimises. Loop and validator take the loss of a micro-batch from here and know nothing else about it.

A result may not depend on how documents are spread over micro-batches and ranks: terms that belong together (later
the two answers of a preference pair) must be in one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from finetune_trainer.data.packing import Batch
from finetune_trainer.model.build import CausalModel


@dataclass(frozen=True)
class Metrics:
    """The n terms of an objective one by one, without weights; each belongs to one example."""

    example: Tensor
    """int64[n]: the example's index in the list that was divided into micro-batches."""
    loss: Tensor
    """float32[n], in nats."""
    correct: Tensor
    """bool[n]: whether the model prefers what it is to learn."""


@dataclass(frozen=True)
class ObjectiveResult:
    """What came of one micro-batch."""

    loss: Tensor
    """The micro-batch's share of the step's loss: its terms times `Batch.target_weight`, summed, so that shares add up
    over micro-batches and ranks without a further factor. float32[] and part of the graph while the model trains, also
    for a micro-batch without a target; float64[] in evaluation mode."""
    metrics: Metrics | None = None
    """In evaluation mode only."""


class Objective(Protocol):
    """Computes a micro-batch; whether for training or for validation follows from `model.training`."""

    def __call__(self, model: CausalModel, batch: Batch) -> ObjectiveResult:
        """One forward pass; `batch` is on the model's device."""


class CrossEntropy:
    """Cross entropy of every target token, with the model's label smoothing while it trains."""

    def __call__(self, model: CausalModel, batch: Batch) -> ObjectiveResult:
        """One forward pass; a term is a target token, correct if it is the most likely one."""
        if model.training:
            return ObjectiveResult((model(batch) * batch.target_weight).sum())
        losses, correct = model(batch, with_correct=True)
        share = (losses * batch.target_weight).double().sum()
        return ObjectiveResult(share, Metrics(batch.target_document, losses, correct))
