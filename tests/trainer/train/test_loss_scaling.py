"""The share of each target in the loss, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.train.loss_scaling import Reduction, target_shares

documents = st.lists(
    st.tuples(st.lists(st.floats(0, 3, width=32), max_size=6), st.sampled_from([0.5, 1.0, 4.0])), min_size=1, max_size=8
)


def loss(made: list[tuple[list[float], float]], reduction: Reduction, cross_entropy: list[list[float]]) -> float:
    weights = [np.array(w, np.float32) for w, _ in made]
    shares = target_shares(weights, np.array([factor for _, factor in made]), reduction)
    return sum(float(np.dot(s, c)) for s, c in zip(shares, cross_entropy, strict=True))


def by_hand(made: list[tuple[list[float], float]], reduction: Reduction, ce: list[list[float]]) -> float:
    labelled = [(w, f, c) for (w, f), c in zip(made, ce, strict=True) if sum(w) > 0]
    if not labelled:
        return 0.0
    sums = [(f * sum(x * y for x, y in zip(w, c, strict=True)), sum(w)) for w, f, c in labelled]
    if reduction == "token":
        return sum(s for s, _ in sums) / sum(n for _, n in sums)
    return sum(s / n for s, n in sums) / len(sums)


@settings(max_examples=100, deadline=None)
@given(documents, st.sampled_from(["token", "example"]))
def test_the_loss_is_the_formula(made: list[tuple[list[float], float]], reduction: Reduction) -> None:
    made = [([0.0 if x < 1e-3 else x for x in w], f) for w, f in made]
    cross_entropy = [[float(np.cos(i * 7 + j) + 2) for j in range(len(w))] for i, (w, _) in enumerate(made)]
    assert loss(made, reduction, cross_entropy) == pytest.approx(by_hand(made, reduction, cross_entropy), rel=1e-5)


def test_a_short_answer_counts_as_much_as_a_long_one_only_by_example() -> None:
    made: list[tuple[list[float], float]] = [([1.0], 1.0), ([1.0] * 99, 1.0)]
    only_the_short_one = [[100.0], [0.0] * 99]
    assert loss(made, "token", only_the_short_one) == pytest.approx(1.0)
    assert loss(made, "example", only_the_short_one) == pytest.approx(50.0)


def test_a_dataset_with_twice_the_loss_weight_counts_twice() -> None:
    assert loss([([1.0], 2.0), ([1.0], 1.0)], "token", [[1.0], [1.0]]) == pytest.approx(1.5)
