"""Properties of the split, whatever the rows."""

import random
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare.split import SplitName, assign, content_key, draw, quotas

ROWS = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 10_000)), min_size=2, max_size=200, unique=True)
SHARES = st.sampled_from([(0.2, 0.0), (0.1, 0.1), (0.0, 0.3), (0.5, 0.25), (0.05, 0.0)])
SEEDS = st.integers(0, 2**31)


def split(
    rows: list[tuple[str, int]], shares: tuple[float, float], seed: int, stratify: bool = True
) -> list[SplitName]:
    ranks = [content_key(seed, repr(row)) for row in rows]
    strata = [label if stratify else "" for label, _ in rows]
    return assign(ranks, strata, np.arange(len(rows)), {"validation": shares[0], "test": shares[1]})


@given(ROWS, SHARES, SEEDS)
def test_every_row_has_one_side_and_the_same_seed_gives_the_same_sides(
    rows: list[tuple[str, int]], shares: tuple[float, float], seed: int
) -> None:
    sides = split(rows, shares, seed)
    assert len(sides) == len(rows)
    assert set(sides) <= {"train", "validation", "test"}
    assert sides == split(rows, shares, seed)


@given(ROWS, SHARES, SEEDS, st.randoms(use_true_random=False))
def test_a_row_s_side_does_not_depend_on_where_it_stands_in_the_file(
    rows: list[tuple[str, int]], shares: tuple[float, float], seed: int, shuffler: random.Random
) -> None:
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    here = dict(zip(rows, split(rows, shares, seed), strict=True))
    assert here == dict(zip(shuffled, split(shuffled, shares, seed), strict=True))


@given(ROWS, SHARES, SEEDS)
def test_every_label_has_its_share_on_every_side_within_one_row_and_stays_in_training(
    rows: list[tuple[str, int]], shares: tuple[float, float], seed: int
) -> None:
    sides = split(rows, shares, seed)
    sizes = Counter(label for label, _ in rows)
    for side, share in (("validation", shares[0]), ("test", shares[1])):
        held = Counter(label for (label, _), of in zip(rows, sides, strict=True) if of == side)
        for label, size in sizes.items():
            assert held[label] < share * size + 1
            if (1 - sum(shares)) * size > 3:  # else a row is taken back, for a label's last row is never held out
                assert held[label] > share * size - 1
    assert {label for (label, _), of in zip(rows, sides, strict=True) if of == "train"} == set(sizes)


@given(ROWS, SHARES, SEEDS)
def test_without_strata_each_side_has_exactly_its_share(
    rows: list[tuple[str, int]], shares: tuple[float, float], seed: int
) -> None:
    counts = Counter(split(rows, shares, seed, stratify=False))
    expected = [round(share * len(rows)) for share in shares]
    if sum(expected) < len(rows):
        assert [counts["validation"], counts["test"]] == expected


@given(ROWS, SHARES, SEEDS, st.integers(1, 30))
def test_rows_that_belong_together_are_on_one_side(
    rows: list[tuple[str, int]], shares: tuple[float, float], seed: int, groups: int
) -> None:
    ranks = [content_key(seed, repr(row)) for row in rows]
    together = np.array([number % groups for _, number in rows])
    sides = assign(ranks, [label for label, _ in rows], together, {"validation": shares[0], "test": shares[1]})
    sides_of_group: dict[int, set[SplitName]] = {}
    for group, side in zip(together, sides, strict=True):
        sides_of_group.setdefault(group, set()).add(side)
    assert all(len(of) == 1 for of in sides_of_group.values())
    counts = Counter(sides)
    assert counts["validation"] <= round(shares[0] * len(rows))
    assert counts["test"] <= round(shares[1] * len(rows))
    assert {label for (label, _), side in zip(rows, sides, strict=True) if side == "train"} == {
        label for label, _ in rows
    }


def test_another_seed_gives_another_split() -> None:
    rows = [("a", number) for number in range(100)]
    assert split(rows, (0.2, 0.0), 1) != split(rows, (0.2, 0.0), 2)


def test_quotas_sum_to_the_share_of_all_rows() -> None:
    assert quotas({"a": 3, "b": 3, "c": 4}, 0.5) == {"a": 2, "b": 1, "c": 2}


@given(ROWS, st.integers(1, 200), SEEDS)
def test_drawing_keeps_proportions_and_takes_exactly_as_many_as_asked(
    rows: list[tuple[str, int]], count: int, seed: int
) -> None:
    ranks = [content_key(seed, repr(row)) for row in rows]
    taken = draw(ranks, [label for label, _ in rows], count)
    assert sum(taken) == min(count, len(rows))
    sizes, kept = (
        Counter(label for label, _ in rows),
        Counter(label for (label, _), chosen in zip(rows, taken, strict=True) if chosen),
    )
    share = min(count / len(rows), 1)
    assert all(abs(kept[label] - share * size) < 1 + 1e-9 for label, size in sizes.items())
