"""Texts that say nearly the same, found without comparing all pairs.

Method: MinHash (Broder 1997) over the set of five-word shingles of the normalised text (case, punctuation and
spacing removed), 64 permutations, banded 16 × 4 (locality-sensitive hashing, Indyk and Motwani 1998); two texts of
one bucket are near-duplicates if their signatures agree in at least 80% of the places, which estimates a
Jaccard similarity of 0.8. Texts of fewer than five words are compared by their whole normalised text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

SHINGLE_WORDS = 5
PERMUTATIONS = 64
BANDS = 16
THRESHOLD = 0.8
LARGE_CLUSTER_SHARE = 0.01
LARGE_CLUSTER_ROWS = 10
"""Clusters above this share of the rows, and this many, are reported and not kept together: they would unbalance
the split."""
METHOD = f"MinHash over {SHINGLE_WORDS}-word shingles, {PERMUTATIONS} permutations, similarity at least {THRESHOLD}"

Signatures = npt.NDArray[np.uint32]

_generator = np.random.default_rng(20240607)
_FACTORS = _generator.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_NOT_A_WORD = re.compile(r"[\W_]+", re.UNICODE)


def normalise(text: str) -> str:
    """The text in lower case, words parted by one space, nothing else."""
    return _NOT_A_WORD.sub(" ", text.lower()).strip()


def signature(text: str) -> Signatures:
    """MinHash signature of a text, uint32[64]. Equal normalised texts have equal signatures."""
    words = normalise(text).split()
    width = min(SHINGLE_WORDS, max(len(words), 1))
    shingles = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
    hashes = np.fromiter((xxhash.xxh64_intdigest(shingle.encode()) for shingle in shingles), np.uint64, len(shingles))
    # Multiply-shift hashing: the product wraps at 2^64, and its upper half orders the shingles anew a factor.
    least: Signatures = ((hashes[:, None] * _FACTORS) >> np.uint64(32)).min(axis=0).astype(np.uint32)
    return least


def clusters(signatures: Signatures) -> npt.NDArray[np.int64]:
    """Cluster of each row, int64[n]: the index of its first member. signatures: uint32[n, 64].

    Members of a bucket are compared with the bucket's first member of each kind, so time grows with the rows.
    """
    rows = len(signatures)
    parent = np.arange(rows, dtype=np.int64)
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        columns = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = columns.view([("", columns.dtype)] * width).ravel()
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]]) if rows else np.empty(0, np.int64)
        ends = np.r_[starts[1:], rows]
        shared = ends - starts > 1
        for start, end in zip(starts[shared], ends[shared], strict=True):
            _join_bucket(order[start:end], signatures, parent)
    return np.fromiter((_root(parent, row) for row in range(rows)), np.int64, rows)


def _join_bucket(members: npt.NDArray[np.int64], signatures: Signatures, parent: npt.NDArray[np.int64]) -> None:
    while len(members) > 1:
        first, rest = members[0], members[1:]
        alike = (signatures[rest] == signatures[first]).mean(axis=1) >= THRESHOLD
        for row in rest[alike]:
            a, b = _root(parent, int(first)), _root(parent, int(row))
            parent[max(a, b)] = min(a, b)
        members = rest[~alike]


def _root(parent: npt.NDArray[np.int64], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def keep_together(cluster: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """(what goes together, sizes of the clusters too large for that): rows of a large cluster stand alone.

    cluster: int64[n], the cluster of each row; what goes together: int64[n], the number of its first row.
    """
    _, first, number, sizes = np.unique(cluster, return_index=True, return_inverse=True, return_counts=True)
    too_large = sizes > max(LARGE_CLUSTER_SHARE * len(cluster), LARGE_CLUSTER_ROWS)
    together = np.where(too_large[number], np.arange(len(cluster)), first[number])
    return together, sorted(sizes[too_large].tolist(), reverse=True)


def joined(first: npt.NDArray[np.int64], second: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """What goes together where rows with an equal value in either do, int64[n]."""
    parent = np.arange(len(first), dtype=np.int64)
    for keys in (first.tolist(), second):
        seen: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            a, b = _root(parent, seen.setdefault(key, row)), _root(parent, row)
            parent[max(a, b)] = min(a, b)
    return np.fromiter((_root(parent, row) for row in range(len(first))), np.int64, len(first))
