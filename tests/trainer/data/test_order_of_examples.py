"""The examples of every step: a pure function of seed, epoch and step, with the mixture's weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.spec import Training
from finetune_trainer.data.mixing import examples_per_epoch
from finetune_trainer.data.order import ExampleSampler, steps_per_epoch


def order_of(sizes: list[int], weights: list[float], batch: int = 4, seed: int = 1) -> ExampleSampler:
    dataset = np.repeat(np.arange(len(sizes)), sizes).astype(np.int16)
    return ExampleSampler.of(dataset, weights, batch, seed)


def epoch_of(order: ExampleSampler, epoch: int) -> list[int]:
    first = epoch * order.steps_per_epoch
    return [int(i) for step in range(first, first + order.steps_per_epoch) for i in order.step(step)]


mixtures = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0.05, 3.5)).map(lambda pair: (pair[0], round(pair[1], 2))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_holds_the_rounded_share_of_each_dataset(
    mixture: list[tuple[int, float]], batch: int, seed: int, epoch: int
) -> None:
    sizes, weights = [size for size, _ in mixture], [weight for _, weight in mixture]
    order = order_of(sizes, weights, batch, seed)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    counts = Counter(owner[epoch_of(order, epoch)].tolist())
    assert counts == {d: max(1, round(weight * size)) for d, (size, weight) in enumerate(mixture)}


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(1, 9), st.integers(0, 5))
def test_no_step_is_empty_and_only_the_last_of_an_epoch_is_smaller(
    mixture: list[tuple[int, float]], batch: int, seed: int
) -> None:
    order = order_of([size for size, _ in mixture], [weight for _, weight in mixture], batch, seed)
    sizes = [len(order.step(step)) for step in range(order.steps_per_epoch)]
    assert all(size == batch for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch
    assert sum(sizes) == order.examples


def test_a_weight_of_one_shows_every_example_once_an_epoch_in_another_order() -> None:
    order = order_of([23], [1.0])
    assert sorted(epoch_of(order, 0)) == sorted(epoch_of(order, 1)) == list(range(23))
    assert epoch_of(order, 0) != epoch_of(order, 1)


def test_a_weight_of_a_half_takes_the_other_half_in_the_next_epoch() -> None:
    order = order_of([20], [0.5])
    first, second = set(epoch_of(order, 0)), set(epoch_of(order, 1))
    assert len(first) == len(second) == 10
    assert first | second == set(range(20))


def test_a_weight_of_two_shows_every_example_twice() -> None:
    assert set(Counter(epoch_of(order_of([9], [2.0]), 3)).values()) == {2}


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    one, other = order_of([17, 8], [1.0, 1.5]), order_of([17, 8], [1.0, 1.5])
    later = [one.step(step).tolist() for step in range(12)]
    assert [other.step(step).tolist() for step in reversed(range(12))] == later[::-1]


def test_another_seed_gives_another_order() -> None:
    assert epoch_of(order_of([30], [1.0], seed=1), 0) != epoch_of(order_of([30], [1.0], seed=2), 0)


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "max_steps", "steps"),
    [
        (100, 32, 1, None, 4),
        (100, 32, 2, None, 8),
        (96, 32, 2, None, 6),
        (100, 10, 2.5, None, 25),
        (100, 32, 0.25, None, 1),
        (3, 32, 1, None, 1),
        (1, 32, 0.01, None, 1),
        (100, 10, 2, 7, 7),
        (100, 10, 2, 700, 700),
    ],
)
def test_steps_in_all(examples: int, batch: int, epochs: float, max_steps: int | None, steps: int) -> None:
    training = Training(global_batch_size=batch, epochs=epochs, max_steps=max_steps)
    assert training.total_steps(examples) == steps


def test_epochs_are_counted_by_examples() -> None:
    order = order_of([10], [1.0], batch=4)
    assert [order.epochs_done(steps) for steps in range(5)] == [0.0, 0.4, 0.8, 1.0, 1.4]


def test_a_dataset_with_rows_always_gives_an_example() -> None:
    assert examples_per_epoch(10, 0.01) == 1
    assert examples_per_epoch(0, 5) == 0
    assert steps_per_epoch(0, 4) == 0
