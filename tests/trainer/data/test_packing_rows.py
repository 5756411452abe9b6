"""Micro-batches: nothing lost, nothing too long, the same number on every rank, every target where it belongs."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.batches import Example
from torch import Tensor

from finetune_trainer.data.packing import (
    Batch,
    best_fit_decreasing,
    bucket,
    collate_packed,
    collate_padded,
    pack,
    share_out,
)

PAD = 99
lengths_lists = st.lists(st.integers(1, 120), min_size=1, max_size=60)
worlds = st.integers(1, 5)


def document(length: int, start: int = 0) -> Example:
    ids = np.arange(start, start + length, dtype=np.int32)
    positions = np.arange(length // 2, max(length - 1, length // 2), dtype=np.int32)
    return Example(ids, positions, ids[positions + 1], np.ones(len(positions), np.float32))


@settings(max_examples=150, deadline=None)
@given(lengths_lists, st.integers(100, 400), worlds)
def test_every_document_is_in_one_row_and_no_row_is_too_long(lengths: list[int], capacity: int, world: int) -> None:
    rows = pack(lengths, capacity, world)
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity or len(row) == 1 for row in rows)
    assert len(rows) % world == 0
    assert len(rows) < len(best_fit_decreasing(lengths, capacity)) + world


@settings(max_examples=150, deadline=None)
@given(lengths_lists, st.integers(100, 800), worlds, st.integers(0, 20))
def test_padded_batches_hold_every_document_once_within_the_budget(
    lengths: list[int], capacity: int, world: int, extra: int
) -> None:
    batches = bucket(lengths, capacity, world, extra)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 1 or len(batch) * (max(lengths[i] for i in batch) + extra) <= capacity
    assert len(batches) % world == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4), st.integers(0, 1000))
def test_ranks_get_nearly_the_same_number_of_tokens(world: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(20, 120, 96).tolist()
    for rows in share_out(pack(lengths, 1024, world), world):
        tokens = [sum(lengths[i] for i in row) for row in rows]
        assert max(tokens) - min(tokens) <= max(lengths)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000))
def test_best_fit_leaves_at_most_two_percent_of_the_rows_empty_where_documents_are_short(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(5, 100, 2000).tolist()
    rows = best_fit_decreasing(lengths, 1024)
    assert sum(lengths) >= 0.98 * 1024 * (len(rows) - 1)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=0, max_size=8), st.integers(1, 16), st.booleans())
def test_targets_point_at_the_state_before_the_token_that_they_name(
    lengths: list[int], multiple: int, padded: bool
) -> None:
    documents = [document(length, 1000 * i) for i, length in enumerate(lengths)]
    weights = [np.full(len(d.target_id), i + 1, np.float32) for i, d in enumerate(documents)]
    slots = [10 + i for i in range(len(documents))]
    if padded:
        batch = collate_padded(documents, slots, weights, PAD)
    else:
        batch = collate_packed(documents, slots, weights, PAD, multiple)
    flat, owner = batch.ids.flatten(), owner_of(batch)
    assert batch.tokens == sum(lengths)
    assert len(batch.target_id) == sum(len(d.target_id) for d in documents)
    for at, target, weight, slot in zip(
        batch.target_position, batch.target_id, batch.target_weight, batch.target_document, strict=True
    ):
        assert flat[at + 1] == target
        assert owner[at] == owner[at + 1] == slot - 10 == weight - 1
    assert [int((owner == i).sum()) for i in range(len(lengths))] == lengths
    check_segments(batch)


def owner_of(batch: Batch) -> Tensor:
    """int64[B*T]: the document of each token, which begins at 1000 times its index; -1 for padding."""
    ids = batch.ids.flatten()
    return torch.where(ids == PAD, -1, ids // 1000)


def check_segments(batch: Batch) -> None:
    """Positions restart where cu_seqlens says, no segment crosses a document, padding is apart from all."""
    bounds = batch.cu_seqlens.tolist()
    positions, owner = batch.positions.flatten(), owner_of(batch)
    assert bounds[0] == 0
    assert bounds[-1] == batch.ids.numel()
    assert batch.max_length == max(b - a for a, b in pairwise(bounds))
    for start, end in pairwise(bounds):
        assert positions[start:end].tolist() == list(range(end - start))
        found = set(owner[start:end].tolist())
        assert len(found - {-1}) <= 1
        assert batch.attention_mask is not None or len(found) == 1
    if batch.attention_mask is not None and batch.tokens:
        assert ((owner >= 0) == batch.attention_mask.flatten().bool()).all()


def test_a_rank_without_a_document_gets_a_filler_without_labels() -> None:
    for filler in (collate_packed([], [], [], PAD), collate_padded([], [], [], PAD)):
        assert filler.ids.numel() > 1
        assert filler.tokens == filler.target_id.numel() == 0
        check_segments(filler)


def test_more_ranks_than_documents_still_have_a_row_each() -> None:
    assert sorted(len(row) for row in pack([5, 6], 100, 4)) == [0, 0, 1, 1]
    assert sorted(len(batch) for batch in bucket([5, 6], 100, 4)) == [0, 0, 1, 1]


def test_a_document_longer_than_the_row_has_a_row_of_its_own() -> None:
    assert pack([500, 10, 10], 100) == [[0], [1, 2]]
