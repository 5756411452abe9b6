"""The learning rate over the steps."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.train.schedule import Schedule

Kind = Literal["cosine", "linear", "constant", "wsd"]
kinds: list[Kind] = ["cosine", "linear", "constant", "wsd"]


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]),
    ],
)
def test_ten_steps_with_two_of_warm_up(kind: Kind, rates: list[float]) -> None:
    schedule = Schedule(kind, peak=1.0, total=10, warmup_ratio=0.2)
    assert [schedule(step) for step in range(10)] == pytest.approx(rates)


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_minimum() -> None:
    schedule = Schedule("cosine", peak=2.0, total=100, minimum_ratio=0.1)
    assert schedule(0) == 2.0
    assert schedule(50) == pytest.approx(2.0 * 0.55)
    assert schedule(99) == pytest.approx(0.2, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(kinds), st.integers(1, 50), st.floats(0, 0.9), st.floats(0, 1))
def test_every_step_learns_something_and_never_more_than_the_peak(
    kind: Kind, total: int, warmup: float, minimum: float
) -> None:
    schedule = Schedule(kind, peak=0.5, total=total, warmup_ratio=warmup, minimum_ratio=minimum)
    rates = [schedule(step) for step in range(total)]
    assert all(0 < rate <= 0.5 + 1e-12 for rate in rates)
    after = rates[schedule.warmup_steps :]
    assert after == sorted(after, reverse=True)
    assert all(rate >= 0.5 * minimum - 1e-12 for rate in after)
