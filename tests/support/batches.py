"""Documents of random tokens and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.data.packing import Batch, collate_packed, collate_padded

PAD = 3


@dataclass
class Example:
    """A document that labels all its tokens but the first, or the last `labelled` of them."""

    ids: NDArray[np.int32]
    target_position: NDArray[np.int32]
    target_id: NDArray[np.int32]
    target_weight: NDArray[np.float32]

    @property
    def tokens(self) -> Tensor:
        """int64[1, T]."""
        return torch.from_numpy(self.ids.astype(np.int64))[None]


def examples(lengths: Sequence[int], *, vocabulary: int = 260, labelled: int | None = None) -> list[Example]:
    """Random documents of these lengths; the same lengths give the same documents."""
    found = []
    for index, length in enumerate(lengths):
        ids = np.random.default_rng([index, length]).integers(4, vocabulary, length).astype(np.int32)
        count = length - 1 if labelled is None else min(labelled, length - 1)
        position = np.arange(length - 1 - count, length - 1, dtype=np.int32)
        found.append(Example(ids, position, ids[position + 1], np.ones(count, np.float32)))
    return found


def packed(documents: Sequence[Example], multiple: int = 1) -> Batch:
    """One row with all of them."""
    weights = [document.target_weight for document in documents]
    return collate_packed(documents, range(len(documents)), weights, PAD, multiple)


def padded(documents: Sequence[Example]) -> Batch:
    """One document per row."""
    return collate_padded(documents, range(len(documents)), [document.target_weight for document in documents], PAD)
