"""How many examples each dataset gives to an epoch, and which ones. Pure."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def examples_per_epoch(rows: int, weight: float) -> int:
    """`round(weight * rows)` (halves to even, as Python rounds), at least one where there are rows."""
    return max(1, round(weight * rows)) if rows else 0


def epoch_examples(rows: int, weight: float, epoch: int, seed: int, dataset: int) -> Int64:
    """Row numbers int64[examples_per_epoch] that one dataset gives to an epoch.

    They are the next piece of an endless stream of permutations of the rows: weight 0.5 takes the other half in the
    next epoch, weight 2 takes every row twice, and no row is seen again before all others were seen.
    """
    count = examples_per_epoch(rows, weight)
    start, end = epoch * count, (epoch + 1) * count
    pieces, at = [], start
    while at < end:
        round_, offset = divmod(at, rows)
        take = min(end - at, rows - offset)
        pieces.append(_permutation(rows, seed, dataset, round_)[offset : offset + take])
        at += take
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, dataset: int, round_: int) -> Int64:
    return generator("rows", seed, dataset, round_).permutation(rows)


def generator(*key: object) -> np.random.Generator:
    """A random generator that depends on `key` alone, the same on every machine."""
    return np.random.Generator(np.random.Philox(seed_of(*key)))


def seed_of(*key: object) -> int:
    """63 bits that depend on `key` alone; different keys give unrelated seeds."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
