"""Turns a step's examples into one rank's micro-batches, weighted for the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.packing import Batch, bucket, collate_packed, collate_padded, pack, share_out
from finetune_trainer.data.prefixes import Shared, among, computed_tokens, shared_prefixes
from finetune_trainer.train.loss_scaling import Float32, Reduction, target_shares


@dataclass(frozen=True)
class RowAssignment:
    """Which examples of a list share a row; the same on all ranks."""

    examples: NDArray[np.int64]
    """Indices in the store."""
    lengths: list[int]
    """Tokens of each."""
    groups: list[Shared]
    """Examples (as indices in the list) with a common prefix; none where prefixes are not shared."""
    rows: list[list[int]]
    """Which examples (as indices in the list) share a row, over all ranks."""

    @property
    def tokens(self) -> int:
        """Tokens of the examples, without padding, however they are computed."""
        return sum(self.lengths)

    @cached_property
    def computed_tokens(self) -> int:
        """Tokens that all ranks compute for the examples: a shared prefix counts once in every row, padding never."""
        if not self.groups:
            return self.tokens
        return sum(computed_tokens([self.lengths[i] for i in row], among(self.groups, row)) for row in self.rows)


@dataclass(frozen=True)
class MicroBatcher:
    """Makes micro-batches of lists of examples; the batchers of the ranks differ in `rank` alone."""

    store: DocumentStore
    loss_weights: NDArray[np.float64]
    """Factor on the loss of each dataset, float64[datasets]."""
    reduction: Reduction
    micro_batch_tokens: int
    """Maximum number of tokens per packed row, or per padded batch with its virtual tokens."""
    pad_id: int
    rank: int = 0
    world_size: int = 1
    packing: bool = True
    virtual_tokens: int = 0
    """Trained tokens that prompt and prefix tuning put before every row."""
    multiple: int = 1
    """Packed rows are padded to a multiple of this many tokens."""
    share_prefixes: bool = False
    """A common prefix of several examples of a step is computed once per row; needs packing."""

    def assign_rows(self, examples: NDArray[np.int64]) -> RowAssignment:
        """Divide examples (indices in the store) into rows; called once per step."""
        lengths = (self.store.offsets[examples + 1] - self.store.offsets[examples]).tolist()
        if not self.packing:
            rows = bucket(lengths, self.micro_batch_tokens, self.world_size, self.virtual_tokens)
            return RowAssignment(examples, lengths, [], rows)
        groups = shared_prefixes([self.store[int(i)] for i in examples]) if self.share_prefixes else []
        return RowAssignment(examples, lengths, groups, pack(lengths, self.micro_batch_tokens, self.world_size, groups))

    def batches(self, assignment: RowAssignment) -> Iterator[Batch]:
        """This rank's micro-batches of a step.

        Every rank yields the same number. `target_weight` are shares of the step's loss, which is thus a plain sum
        over all ranks and micro-batches.
        """
        shares = target_shares(*self._weights(assignment.examples), self.reduction)
        for rows in share_out(assignment.rows, self.world_size):
            slots = rows[self.rank]
            chosen = [shares[slot] for slot in slots]
            yield self._collate(assignment.examples, slots, chosen, among(assignment.groups, slots))

    def largest(self) -> Batch:
        """The most expensive micro-batch possible: the longest documents until it is full, with all their targets."""
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
        self, examples: NDArray[np.int64], slots: Sequence[int], shares: list[Float32], groups: Sequence[Shared] = ()
    ) -> Batch:
        documents = [self.store[int(examples[slot])] for slot in slots]
        if self.packing:
            return collate_packed(documents, slots, shares, self.pad_id, self.multiple, groups)
        return collate_padded(documents, slots, shares, self.pad_id)
