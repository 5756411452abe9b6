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
from finetune_trainer.train.batches import Batcher


@dataclass(frozen=True)
class OfDataset:
    """What was seen of one dataset."""

    documents: int
    loss: float
    """Mean over its labelled tokens, in nats, without weights."""
    accuracy: float
    """As for all of them."""


@dataclass(frozen=True)
class Validation:
    """Means over the validation documents."""

    loss: float
    """In the job's own reduction and loss weights, without label smoothing."""
    accuracy: float
    """Teacher-forced: a document of a closed task counts if every token of its answer is the most likely one,
    another counts with the share of its labelled tokens that are."""
    datasets: dict[str, OfDataset] = field(default_factory=dict)
    """By name, those of which a document was looked at."""


class Validator:
    """Validates on the same documents each time."""

    def __init__(
        self,
        batcher: Batcher,
        names: Sequence[str],
        closed: NDArray[np.bool_],
        rows: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """At most `rows` documents of the batcher's store, drawn once; `names` and `closed`: bool, of each dataset."""
        store = batcher.store
        drawn = generator("validation", seed).permutation(len(store))[:rows]
        self._examples = np.sort(drawn)
        self._batcher, self._device = batcher, device
        self._divided = batcher.divide(self._examples)
        self._names = list(names)
        self._dataset = torch.from_numpy(store.dataset[self._examples].astype(np.int64)).to(device)
        self._closed = torch.from_numpy(closed).to(device)[self._dataset]

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
        labels, lost = torch.zeros_like(right), torch.zeros_like(right)
        for batch in self._batcher.batches(self._divided):
            batch = batch.to(self._device)
            losses, correct = model(batch, with_correct=True)
            loss += (losses * batch.target_weight).double().sum()
            right.index_add_(0, batch.target_document, correct.double())
            labels.index_add_(0, batch.target_document, torch.ones_like(losses, dtype=torch.float64))
            lost.index_add_(0, batch.target_document, losses.double())
        model.train()
        seen = (labels > 0).double()
        scores = seen * torch.where(self._closed, (right == labels).double(), right / labels.clamp(min=1))
        sums = torch.zeros(4, len(self._names), dtype=torch.float64, device=self._device)
        sums.index_add_(1, self._dataset, torch.stack([scores, seen, lost, labels]))
        totals = torch.cat([loss[None], sums.flatten()])
        if dist.get_world_size() > 1:
            dist.all_reduce(totals)
        return _validation(totals, self._names)


def _validation(totals: Tensor, names: Sequence[str]) -> Validation:
    """From float64[1 + 4 * datasets]: the loss, then scores, documents, summed losses and labels of each dataset."""
    loss, *sums = totals.tolist()
    count = len(names)
    scores, documents, lost, labels = (sums[part * count : (part + 1) * count] for part in range(4))
    datasets = {
        name: OfDataset(round(documents[i]), lost[i] / labels[i], scores[i] / documents[i])
        for i, name in enumerate(names)
        if documents[i]
    }
    return Validation(loss, sum(scores) / max(1.0, sum(documents)), datasets)
