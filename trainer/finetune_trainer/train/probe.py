"""The trained model's loss on a few documents, which Evaluate compares with the loss of the export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_api.report import ExportProbe
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.packing import collate_packed, collate_padded
from finetune_trainer.model.build import CausalModel
from finetune_trainer.model.device import row_multiple

DOCUMENTS = 8
CANDIDATES = 256
"""Documents, evenly spread over the store, of which the shortest are taken."""


@dataclass(frozen=True)
class _WholeDocument:
    """A document whose every token is a target but the first: more says more about the weights."""

    ids: NDArray[np.int32]

    @property
    def target_position(self) -> NDArray[np.int32]:
        return np.arange(len(self.ids) - 1, dtype=np.int32)

    @property
    def target_id(self) -> NDArray[np.int32]:
        return self.ids[1:]

    @property
    def target_weight(self) -> NDArray[np.float32]:
        return np.ones(len(self.ids) - 1, np.float32)


def drawn(lengths: NDArray[np.int64]) -> list[int]:
    """Indices of the documents that are measured, given all lengths in tokens; those with a single token are not."""
    candidates = np.unique(np.linspace(0, len(lengths) - 1, min(CANDIDATES, len(lengths))).astype(int))
    candidates = candidates[lengths[candidates] > 1]
    return sorted(candidates[np.argsort(lengths[candidates], kind="stable")][:DOCUMENTS].tolist())


@torch.no_grad()
def measure(
    model: CausalModel, store: DocumentStore, split: Literal["train", "validation"], pad_id: int, device: torch.device
) -> ExportProbe:
    """The mean loss over all tokens of a few documents. Collective; leaves the model in evaluation mode."""
    model.eval()
    documents, total, tokens = drawn(np.asarray(store.lengths)), 0.0, 0
    for index in documents:
        document = _WholeDocument(np.array(store[index].ids))
        weights = [document.target_weight]
        if model.packs:
            batch = collate_packed([document], [0], weights, pad_id, row_multiple(device))
        else:
            batch = collate_padded([document], [0], weights, pad_id)
        total += float(model(batch.to(device)).double().sum())
        tokens += len(document.target_id)
    return ExportProbe(split=split, documents=documents, tokens=tokens, loss=total / max(1, tokens))
