"""What a training remembers of its validations: the best one, and how long nothing has improved."""

from __future__ import annotations

import math

import pytest

from finetune_trainer.train.state import Best, TrainState


def seen(*losses: float, patience: int | None = None) -> TrainState:
    state = TrainState()
    for loss in losses:
        state.step += 1
        state.record_validation(loss, loss, patience)
    return state


def test_the_lowest_loss_is_the_best_and_an_equal_one_later_is_not() -> None:
    assert seen(2.0, 1.0, 1.0, 3.0).best == Best(step=2, loss=1.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best_and_leaves_the_checkpoint_readable(broken: float) -> None:
    assert seen(broken, 2.0).best == Best(step=2, loss=2.0)
    state = seen(broken)
    assert state.best is None
    assert TrainState.model_validate_json(state.model_dump_json()) == state


@pytest.mark.parametrize(
    ("losses", "patience", "stopped"),
    [
        ((1.0, 2.0, 3.0), 2, True),
        ((1.0, 2.0, 0.5), 2, False),
        ((1.0, math.nan, math.nan), 2, True),
        ((1.0, 2.0, 3.0), None, False),
    ],
)
def test_so_many_validations_without_improvement_end_the_training(
    losses: tuple[float, ...], patience: int | None, stopped: bool
) -> None:
    assert seen(*losses, patience=patience).stopped_early is stopped
