"""Rows with shared prefixes: every document comes back whole, every target once, and no token is computed in vain."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.batches import Example

from finetune_trainer.data.packing import Batch, collate_packed, pack, share_out
from finetune_trainer.data.prefixes import (
    LEAST_SHARED_PREFIX,
    Shared,
    among,
    common_length,
    computed_tokens,
    shared_prefixes,
)

PAD = 99


def made(tokens: list[int], labels: list[int]) -> Example:
    """A document whose tokens at `labels` (not the first) are labelled."""
    ids = np.array(tokens, dtype=np.int32)
    position = np.array(sorted({label - 1 for label in labels if 0 < label < len(ids)}), dtype=np.int32)
    return Example(ids, position, ids[position + 1], np.arange(1, len(position) + 1, dtype=np.float32))


@st.composite
def documents(draw: st.DrawFn) -> list[Example]:
    """Documents of few different tokens behind a few beginnings, which may begin alike themselves."""
    base = draw(st.lists(st.integers(0, 3), max_size=20))
    beginnings = [base + draw(st.lists(st.integers(0, 3), max_size=12)) for _ in range(draw(st.integers(1, 3)))]
    found = []
    for _ in range(draw(st.integers(1, 14))):
        tokens = [*draw(st.sampled_from(beginnings)), *draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))]
        found.append(made(tokens, draw(st.lists(st.integers(0, len(tokens)), max_size=4))))
    return found


def batches(found: list[Example], capacity: int, world: int) -> tuple[list[list[int]], list[Batch]]:
    """The rows of a step and their tensors."""
    groups = shared_prefixes(found)
    rows = pack([len(d.ids) for d in found], capacity, world, groups)
    made_of_rows = [
        collate_packed([found[i] for i in row], row, [found[i].target_weight for i in row], PAD, 1, among(groups, row))
        for row in rows
    ]
    return rows, made_of_rows


def places_of(batch: Batch, groups: list[Shared], count: int) -> list[list[int]]:
    """Where the tokens of each of a row's `count` documents are: its prefix, then its own part."""
    grouped = [i for group in groups for i in group.members]
    order = [*(i for i in range(count) if i not in grouped), *grouped]
    prefixes = [range(a, b) for a, b, _ in batch.shared]
    own = [range(a, b) for a, b in pairwise(batch.bounds) if range(a, b) not in prefixes]
    places: list[list[int]] = [[] for _ in range(count)]
    for document, segment in zip(order, own, strict=count > 0):
        places[document] = [i for a, b, c in batch.shared if b <= segment.start < c for i in range(a, b)] + [*segment]
    return places


@settings(max_examples=200, deadline=None)
@given(documents(), st.integers(40, 200), st.integers(1, 4))
def test_every_document_comes_back_and_every_target_stands_once_where_it_is_predicted(
    found: list[Example], capacity: int, world: int
) -> None:
    rows, made_of_rows = batches(found, capacity, world)
    assert Counter(i for row in rows for i in row) == Counter(range(len(found)))
    assert len(rows) % world == 0
    for row, batch in zip(rows, made_of_rows, strict=True):
        assert batch.tokens <= capacity or len(row) == 1
        ids, positions = batch.ids.flatten(), batch.positions.flatten()
        expected = Counter()
        places = places_of(batch, among(shared_prefixes(found), row), len(row))
        for at, index in zip(places, row, strict=True):
            assert ids[at].tolist() == found[index].ids.tolist()
            assert positions[at].tolist() == list(range(len(at)))
            document = found[index]
            for position, target, weight in zip(
                document.target_position, document.target_id, document.target_weight, strict=True
            ):
                expected[at[position], int(target), float(weight), index] += 1
        given_targets = (batch.target_position, batch.target_id, batch.target_weight, batch.target_document)
        assert Counter(zip(*(t.tolist() for t in given_targets), strict=True)) == expected


@settings(max_examples=200, deadline=None)
@given(documents(), st.integers(40, 200), st.integers(1, 4))
def test_the_tokens_of_a_step_are_those_of_its_documents_less_the_repetitions(
    found: list[Example], capacity: int, world: int
) -> None:
    lengths = [len(d.ids) for d in found]
    groups = shared_prefixes(found)
    rows, made_of_rows = batches(found, capacity, world)
    repeated = sum((len(g.members) - 1) * g.length for row in rows for g in among(groups, row))
    assert sum(batch.tokens for batch in made_of_rows) == sum(lengths) - repeated
    assert sum(computed_tokens([lengths[i] for i in row], among(groups, row)) for row in rows) == sum(
        batch.tokens for batch in made_of_rows
    )


@settings(max_examples=200, deadline=None)
@given(documents())
def test_a_prefix_is_common_to_its_documents_and_holds_none_of_their_labelled_tokens(found: list[Example]) -> None:
    groups = shared_prefixes(found)
    members = [i for group in groups for i in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        first = found[group.members[0]].ids[: group.length].tolist()
        assert group.length >= LEAST_SHARED_PREFIX
        for i in group.members:
            assert found[i].ids[: group.length].tolist() == first
            assert len(found[i].ids) > group.length
            assert all(position + 1 >= group.length for position in found[i].target_position)


@settings(max_examples=100, deadline=None)
@given(documents())
def test_no_other_division_into_neighbours_saves_more(found: list[Example]) -> None:
    """Against every way to cut the sorted documents."""
    found = found[:8]
    beginnings = [d.ids[: min(len(d.ids) - 1, *(int(p) + 1 for p in d.target_position), 10**6)] for d in found]
    order = sorted(range(len(found)), key=lambda i: beginnings[i].tobytes())

    def saved(run: list[int]) -> int:
        prefix = min(common_length(beginnings[run[0]], beginnings[i]) for i in run)
        return (len(run) - 1) * prefix if prefix >= LEAST_SHARED_PREFIX else 0

    most = 0
    for cuts in range(2 ** (len(order) - 1)):
        runs, run = [], [order[0]]
        for place, index in enumerate(order[1:]):
            if cuts >> place & 1:
                runs.append(run)
                run = []
            run.append(index)
        most = max(most, sum(map(saved, [*runs, run])))
    assert sum((len(g.members) - 1) * g.length for g in shared_prefixes(found)) == most


def test_two_tasks_of_one_step_get_a_prefix_each() -> None:
    one, other = list(range(20)), list(range(50, 70))
    found = [made([*beginning, 100 + i], [20]) for i, beginning in enumerate([one, other, one, other, [7]])]
    assert shared_prefixes(found) == [Shared(20, (0, 2)), Shared(20, (1, 3))]


def test_one_position_of_a_prefix_may_have_several_targets() -> None:
    found = [made([*range(20), 100 + i], [20]) for i in range(3)]
    _, [batch] = batches(found, 100, 1)
    assert batch.target_position.tolist() == [19, 19, 19]
    assert batch.target_id.tolist() == [100, 101, 102]
    assert batch.tokens == 23
    assert batch.max_length == 20


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_group_is_divided_over_the_ranks_and_over_rows_that_are_full(world: int) -> None:
    groups = [Shared(400, tuple(range(120)))]
    rows = pack([414] * 120, 1024, world, groups)
    loads = [400 + 14 * len(row) for row in rows]
    assert max(loads) <= 1024
    assert len(rows) == {1: 3, 2: 4, 3: 3}[world]
    assert all(max(row) - min(row) <= 14 for row in share_out(loads, world))
    few = pack([414] * 12, 1024, world, [Shared(400, tuple(range(12)))])
    assert [len(row) for row in few] == [12 // world] * world


def test_ranks_wait_little_for_each_other_with_groups_and_documents_alone() -> None:
    random = np.random.default_rng(2)
    lengths = [*(300 + random.integers(5, 40, 40)), *random.integers(50, 500, 30)]
    groups = [Shared(300, tuple(range(40)))]
    for world in (2, 3, 4):
        for rows in share_out(pack([int(n) for n in lengths], 2048, world, groups), world):
            loads = [computed_tokens([lengths[i] for i in row], among(groups, row)) for row in rows]
            assert max(loads) <= 1.25 * min(loads)
