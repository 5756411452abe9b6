"""From examples to the micro-batches of one rank, weighted for the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.packing import Batch, bucket, collate_packed, collate_padded, pack, share_out
from finetune_trainer.data.prefixes import Shared, among, computed_tokens, shared_prefixes
from finetune_trainer.train.loss_scaling import Float32, Reduction, target_shares


@dataclass(frozen=True)
class Batcher:
    """Divides lists of examples; all ranks hold equal batchers but for `rank`."""

    store: DocumentStore
    loss_weights: NDArray[np.float64]
    """Factor on the loss of each dataset, float64[datasets]."""
    reduction: Reduction
    micro_batch_tokens: int
    """Tokens of a packed row, or of a padded batch with its virtual tokens, at most."""
    pad_id: int
    rank: int = 0
    world_size: int = 1
    packing: bool = True
    virtual_tokens: int = 0
    """Trained tokens that prompt and prefix tuning put before every row."""
    multiple: int = 1
    """Packed rows are padded to a multiple of so many tokens."""
    share_prefixes: bool = False
    """What several examples of a step begin with stands once in a row; needs packing."""

    def batches(self, examples: NDArray[np.int64]) -> Iterator[Batch]:
        """This rank's micro-batches of a step whose examples (indices in the store) are given.

        Every rank yields the same number. The loss of the step is the sum over all ranks and micro-batches of
        sum(target_weight * cross entropy).
        """
        shares = target_shares(*self._weights(examples), self.reduction)
        groups = self.shared(examples)
        for rows in share_out(self.rows(examples, groups), self.world_size):
            slots = rows[self.rank]
            yield self._collate(examples, slots, [shares[slot] for slot in slots], among(groups, slots))

    def shared(self, examples: NDArray[np.int64]) -> list[Shared]:
        """Examples (as indices in the list) that begin alike; none where prefixes are not shared."""
        return shared_prefixes([self.store[int(example)] for example in examples]) if self.share_prefixes else []

    def rows(self, examples: NDArray[np.int64], groups: Sequence[Shared] = ()) -> list[list[int]]:
        """Which examples (as indices in the list) share a row, over all ranks."""
        lengths = self.store.lengths[examples].tolist()
        if self.packing:
            return pack(lengths, self.micro_batch_tokens, self.world_size, groups)
        return bucket(lengths, self.micro_batch_tokens, self.world_size, self.virtual_tokens)

    def tokens(self, examples: NDArray[np.int64]) -> int:
        """Tokens of the examples, without padding, however they are computed."""
        return int(self.store.lengths[examples].sum())

    def computed_tokens(self, examples: NDArray[np.int64]) -> int:
        """Tokens that all ranks compute for the examples: a shared prefix counts once in every row, padding never."""
        groups = self.shared(examples)
        if not groups:
            return self.tokens(examples)
        lengths = self.store.lengths[examples].tolist()
        rows = self.rows(examples, groups)
        return sum(computed_tokens([lengths[i] for i in row], among(groups, row)) for row in rows)

    def largest(self) -> Batch:
        """The costliest micro-batch there can be: the longest documents until it is full, every label kept."""
        longest = np.argsort(-self.store.lengths, kind="stable")
        lengths = self.store.lengths[longest] + self.virtual_tokens
        if self.packing:
            fits = max(1, int((np.cumsum(lengths) <= self.micro_batch_tokens).sum()))
        else:
            fits = max(1, int(self.micro_batch_tokens // lengths[0]))
        examples = np.resize(longest, fits)
        return self._collate(examples, range(fits), target_shares(*self._weights(examples), self.reduction))

    def _weights(self, examples: NDArray[np.int64]) -> tuple[list[Float32], NDArray[np.float64]]:
        documents = [self.store[int(example)] for example in examples]
        weights = [document.target_weight for document in documents]
        return weights, self.loss_weights[[document.dataset for document in documents]]

    def _collate(
        self,
        examples: NDArray[np.int64],
        slots: Sequence[int],
        shares: list[Float32],
        groups: Sequence[Shared] = (),
    ) -> Batch:
        documents = [self.store[int(examples[slot])] for slot in slots]
        if self.packing:
            return collate_packed(documents, slots, shares, self.pad_id, self.multiple, groups)
        return collate_padded(documents, slots, shares, self.pad_id)
