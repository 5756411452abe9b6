"""Loss and accuracy on held-out documents, with the same number of forward passes on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.data.mixing import generator
from finetune_trainer.model.build import CausalModel
from finetune_trainer.train.batches import MicroBatcher
from finetune_trainer.train.objective import Objective


@dataclass(frozen=True)
class DatasetScores:
    """Means over the validation documents of one dataset."""

    documents: int
    loss: float
    """Mean over the objective's terms (for cross entropy: labelled tokens), in nats, without weights."""
    accuracy: float
    """As in `Validation`."""


@dataclass(frozen=True)
class Validation:
    """Means over the validation documents."""

    loss: float
    """With the job's own reduction and loss weights, without label smoothing."""
    accuracy: float
    """Teacher-forced: a document of a closed task scores 1 if all of its terms (for cross entropy: the tokens of its
    answer) are correct, any other document scores the share that is."""
    datasets: dict[str, DatasetScores] = field(default_factory=dict)
    """By name; only those with a validation document."""


class Validator:
    """Validates on the same documents each time."""

    def __init__(
        self,
        batcher: MicroBatcher,
        objective: Objective,
        names: Sequence[str],
        closed: NDArray[np.bool_],
        rows: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """At most `rows` documents of the batcher's store, drawn once; `names` and `closed` (bool) are by dataset."""
        store = batcher.store
        drawn = generator("validation", seed).permutation(len(store))[:rows]
        self._examples = np.sort(drawn)
        self._batcher, self._objective, self._device = batcher, objective, device
        self._assignment = batcher.assign_rows(self._examples)
        self._names = list(names)
        self._dataset = torch.from_numpy(store.dataset[self._examples].astype(np.int64)).to(device)
        self._closed = torch.from_numpy(closed).to(device)[self._dataset]

    @torch.no_grad()
    def __call__(self, model: CausalModel) -> Validation:
        """Validate. Collective; leaves the model in training mode."""
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        right = torch.zeros(len(self._examples), dtype=torch.float64, device=self._device)
        terms, lost = torch.zeros_like(right), torch.zeros_like(right)
        for batch in self._batcher.batches(self._assignment):
            result = self._objective(model, batch.to(self._device))
            loss += result.loss
            metrics = result.metrics
            assert metrics is not None
            right.index_add_(0, metrics.example, metrics.correct.double())
            terms.index_add_(0, metrics.example, torch.ones_like(metrics.loss, dtype=torch.float64))
            lost.index_add_(0, metrics.example, metrics.loss.double())
        model.train()
        scored = (terms > 0).double()
        scores = scored * torch.where(self._closed, (right == terms).double(), right / terms.clamp(min=1))
        sums = torch.zeros(4, len(self._names), dtype=torch.float64, device=self._device)
        sums.index_add_(1, self._dataset, torch.stack([scores, scored, lost, terms]))
        totals = torch.cat([loss[None], sums.flatten()])
        if dist.get_world_size() > 1:
            dist.all_reduce(totals)
        return _validation(totals, self._names)


def _validation(totals: Tensor, names: Sequence[str]) -> Validation:
    """From float64[1 + 4 * datasets]: the loss, then scores, documents, summed losses and terms of each dataset."""
    loss, *sums = totals.tolist()
    count = len(names)
    scores, documents, lost, terms = (sums[part * count : (part + 1) * count] for part in range(4))
    datasets = {
        name: DatasetScores(round(documents[i]), lost[i] / terms[i], scores[i] / documents[i])
        for i, name in enumerate(names)
        if documents[i]
    }
    return Validation(loss, sum(scores) / max(1.0, sum(documents)), datasets)
