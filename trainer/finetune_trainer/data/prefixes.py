"""What documents begin with in common: found in their finished tokens, never by tokenising a beginning apart. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LEAST_SHARED_PREFIX = 8
"""Tokens below which computing a beginning once saves less than it costs to keep apart."""


class Labelled(Protocol):
    """What is needed of a document here."""

    @property
    def ids(self) -> NDArray[np.int32]: ...
    @property
    def target_position(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Shared:
    """Documents that begin with the same tokens."""

    length: int
    """Tokens that all of them begin with; each has at least one more."""
    members: tuple[int, ...]
    """Their indices, ascending; at least two."""


def common_length(one: Sequence[int] | NDArray[Any], other: Sequence[int] | NDArray[Any]) -> int:
    """Tokens that both begin with."""
    length = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(different[0]) if len(different) else length


def shared_prefixes(documents: Sequence[Labelled], least: int = LEAST_SHARED_PREFIX) -> list[Shared]:
    """Groups of documents with a common beginning, such that the most tokens need not be computed again.

    A document's labelled tokens and its last token are its own, so a prefix ends before them; the prefix's last
    position may still predict the first own token of several documents. Each document is in one group at most.
    """
    beginnings = [document.ids[: _sharable(document)] for document in documents]
    order = sorted(range(len(documents)), key=lambda i: beginnings[i].tobytes())  # equal beginnings side by side
    common = [common_length(beginnings[i], beginnings[j]) for i, j in itertools.pairwise(order)]
    groups = []
    for start, end in _runs(np.array(common, dtype=np.int64), least):
        if end - start > 1:
            groups.append(Shared(min(common[start : end - 1]), tuple(sorted(order[start:end]))))
    return sorted(groups, key=lambda group: group.members)


def _sharable(document: Labelled) -> int:
    labels = document.target_position
    return min(len(document.ids) - 1, int(labels.min()) + 1 if len(labels) else len(document.ids))


def _runs(common: NDArray[np.int64], least: int) -> list[tuple[int, int]]:
    """The division of a sorted list into runs [start, end) that saves the most: (documents - 1) * prefix each.

    `common[i]` are the tokens that documents i and i + 1 begin with. Exact, in n steps over arrays of up to n.
    """
    count = len(common) + 1
    best, begins = np.zeros(count + 1, np.int64), [0] * (count + 1)
    shortest = np.empty(count, np.int64)  # of the run from i to the current end
    for end in range(1, count + 1):
        if end > 1:
            np.minimum(shortest[: end - 1], common[end - 2], out=shortest[: end - 1])
        shortest[end - 1] = np.iinfo(np.int64).max
        prefix = np.where(shortest[: end - 1] < least, 0, shortest[: end - 1])
        saved = np.append(best[: end - 1] + prefix * np.arange(end - 1, 0, -1), best[end - 1])
        begins[end] = end - 1 - int(saved[::-1].argmax())  # a document that shares nothing stays alone
        best[end] = saved[begins[end]]
    runs, end = [], count
    while end:
        runs.append((begins[end], end))
        end = begins[end]
    return runs[::-1]


def among(groups: Sequence[Shared], chosen: Sequence[int]) -> list[Shared]:
    """The groups as far as their members are chosen, renumbered by place in `chosen`; none with one member."""
    place = {index: at for at, index in enumerate(chosen)}
    found = [Shared(g.length, tuple(place[i] for i in g.members if i in place)) for g in groups]
    return [group for group in found if len(group.members) > 1]


def computed_tokens(lengths: Sequence[int], groups: Sequence[Shared]) -> int:
    """Tokens of documents of these lengths when what each group shares is computed once."""
    return sum(lengths) - sum(group.length * (len(group.members) - 1) for group in groups)
