"""Loss and accuracy on held-out documents, with the same number of forward passes on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from finetune_trainer.data.mixing import generator
from finetune_trainer.model.build import CausalModel
from finetune_trainer.train.batches import Batcher


@dataclass(frozen=True)
class Validation:
    """Means over the validation documents."""

    loss: float
    """In the job's own reduction and loss weights, without label smoothing."""
    accuracy: float
    """Teacher-forced: a document of a closed task counts if every token of its answer is the most likely one,
    another counts with the share of its labelled tokens that are."""


class Validator:
    """Validates on the same documents each time."""

    def __init__(self, batcher: Batcher, closed: NDArray[np.bool_], rows: int, seed: int, device: torch.device) -> None:
        """At most `rows` documents of the batcher's store, drawn once; `closed` is bool[datasets]."""
        store = batcher.store
        drawn = generator("validation", seed).permutation(len(store))[:rows]
        self._examples = np.sort(drawn)
        self._batcher, self._device = batcher, device
        self._closed = torch.from_numpy(closed[store.dataset[self._examples]]).to(device)

    @property
    def documents(self) -> int:
        """Documents it looks at."""
        return len(self._examples)

    @torch.no_grad()
    def __call__(self, model: CausalModel) -> Validation:
        """Validate. Collective; leaves the model in training mode."""
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        right = torch.zeros(len(self._examples), dtype=torch.float64, device=self._device)
        labels = torch.zeros_like(right)
        for batch in self._batcher.batches(self._examples):
            batch = batch.to(self._device)
            losses, correct = model(batch, with_correct=True)
            loss += (losses * batch.target_weight).double().sum()
            right.index_add_(0, batch.target_document, correct.double())
            labels.index_add_(0, batch.target_document, torch.ones_like(losses, dtype=torch.float64))
        model.train()
        seen = labels > 0
        scores = torch.where(self._closed, (right == labels).double(), right / labels.clamp(min=1))
        totals = torch.stack([loss, scores[seen].sum(), seen.sum().double()])
        if dist.get_world_size() > 1:
            dist.all_reduce(totals)
        total_loss, total_score, documents = totals.tolist()
        return Validation(total_loss, total_score / max(1.0, documents))
