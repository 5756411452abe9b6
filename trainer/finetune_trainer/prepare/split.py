"""Who learns and who is held out: a pure function of the rows' contents and the seed.

Nothing here depends on the rows' order in the file: rows are ranked by a keyed hash of their content, so a
shuffled file gives the same split. Rows that belong together (groups, near-duplicates) move as one unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

SplitName = Literal["train", "validation", "test", "left out", "excluded"]
"""`left out`: not drawn by maxRows, free for a baseline; `excluded`: the same, but too like a held-out row."""


def content_key(seed: int, content: str) -> int:
    """64-bit rank of a row with that content under that seed: what decides instead of the row's position."""
    return int.from_bytes(blake2b(content.encode(), digest_size=8, key=str(seed).encode()[:64]).digest(), "big")


def occurrence(contents: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The how-manieth of its kind each element is, from 1: [7, 9, 7] -> [1, 1, 2]."""
    order = np.argsort(contents, kind="stable")
    ordered, place = contents[order], np.arange(len(contents))
    begins = np.r_[True, ordered[1:] != ordered[:-1]][: len(contents)]
    found = np.empty(len(contents), np.int64)
    found[order] = place - np.maximum.accumulate(np.where(begins, place, 0)) + 1
    return found


@dataclass
class Unit:
    """Rows that may not be parted."""

    rank: int
    rows: list[int] = field(default_factory=list)
    strata: Counter[Hashable] = field(default_factory=Counter)


def units_of(ranks: Sequence[int], strata: Sequence[Hashable], together: npt.NDArray[np.int64]) -> Iterator[Unit]:
    """Rows with an equal value in `together` as units, larger ones first, then by the least of their rows' ranks.

    Most rows stand alone: a unit of one row is made when its turn comes.
    """
    _, number, sizes = np.unique(together, return_inverse=True, return_counts=True)
    alone = sizes[number] == 1
    several: dict[int, Unit] = {}
    for row in np.flatnonzero(~alone).tolist():
        unit = several.setdefault(int(number[row]), Unit(ranks[row]))
        unit.rank = min(unit.rank, ranks[row])
        unit.rows.append(row)
        unit.strata[strata[row]] += 1
    yield from sorted(several.values(), key=lambda unit: (-len(unit.rows), unit.rank))
    rows = np.flatnonzero(alone)
    for row in map(int, rows[np.argsort(np.asarray(ranks, np.uint64)[rows], kind="stable")]):
        yield Unit(ranks[row], [row], Counter({strata[row]: 1}))


def quotas(sizes: dict[Hashable, int], share: float) -> dict[Hashable, int]:
    """Rows of each stratum to hold out: share × size rounded down or up so that the sum is round(share × all).

    Largest remainders first (Hamilton's method), so each stratum is within 1 of its exact share.
    """
    exact = {stratum: share * size for stratum, size in sizes.items()}
    held = {stratum: int(value + 1e-9) for stratum, value in exact.items()}
    missing = round(share * sum(sizes.values())) - sum(held.values())
    by_remainder = sorted(exact, key=lambda stratum: (held[stratum] - exact[stratum], str(stratum)))
    for stratum in by_remainder[: max(missing, 0)]:
        if exact[stratum] > held[stratum] + 1e-9:
            held[stratum] += 1
    return held


def assign(
    ranks: Sequence[int], strata: Sequence[Hashable], together: npt.NDArray[np.int64], shares: dict[SplitName, float]
) -> list[SplitName]:
    """The side of each row; what no share asks for is `train`.

    ranks: a row's `content_key`; strata: what is kept in proportion (the label; a constant for none); together:
    int64[n], rows with an equal value go to one side. Larger units are placed first, each on the held-out side that
    lacks most of what it holds, if all of it fits; single rows then fill each side's quota exactly. Every stratum
    keeps at least one row in train.
    """
    sizes = Counter(strata)
    wanted = {side: Counter(quotas(dict(sizes), share)) for side, share in shares.items()}
    _leave_one_to_train(wanted, sizes)
    remaining = Counter(sizes)
    sides: list[SplitName] = ["train"] * len(ranks)
    for unit in units_of(ranks, strata, together):
        if all(lacking.total() <= 0 for lacking in wanted.values()):
            break  # nothing is asked for any more
        side = _side_of(unit, wanted, remaining)
        if side == "train":
            continue
        wanted[side].subtract(unit.strata)
        remaining.subtract(unit.strata)
        for row in unit.rows:
            sides[row] = side
    return sides


def _side_of(unit: Unit, wanted: dict[SplitName, Counter[Hashable]], remaining: Counter[Hashable]) -> SplitName:
    size = len(unit.rows)
    if any(remaining[stratum] - count < 1 for stratum, count in unit.strata.items()):
        return "train"
    fitting = [
        side
        for side, lacking in wanted.items()
        if lacking.total() >= size and (size > 1 or lacking[next(iter(unit.strata))] > 0)
    ]
    return max(
        fitting,
        key=lambda side: sum(min(max(wanted[side][s], 0), n) for s, n in unit.strata.items()) / wanted[side].total(),
        default="train",
    )


def _leave_one_to_train(wanted: dict[SplitName, Counter[Hashable]], sizes: Counter[Hashable]) -> None:
    for stratum, size in sizes.items():
        for held in wanted.values():
            excess = sum(other[stratum] for other in wanted.values()) - (size - 1)
            held[stratum] = max(0, held[stratum] - max(excess, 0))


def draw(ranks: Sequence[int], strata: Sequence[Hashable], count: int) -> list[bool]:
    """Which rows are among the `count` that are drawn: in proportion to the strata, in the order of the ranks.

    Rows of equal content have equal ranks; the earlier is taken first.
    """
    if count >= len(ranks):
        return [True] * len(ranks)
    left = Counter(quotas(dict(Counter(strata)), count / len(ranks)))
    missing = left.total()
    taken = [False] * len(ranks)
    for row in map(int, np.argsort(np.asarray(ranks, np.uint64), kind="stable")):
        if not missing:
            break
        if left[strata[row]] > 0:
            left[strata[row]] -= 1
            missing -= 1
            taken[row] = True
    return taken
