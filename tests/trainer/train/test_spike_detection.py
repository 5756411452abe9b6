"""What is a spike, what is only a hard batch, and which steps are left out."""

from __future__ import annotations

import math

from finetune_trainer.train.spikes import WINDOW, Spike, SpikeState, observe


def seen(losses: list[float], warm_from: int = 0) -> tuple[list[Spike], SpikeState]:
    state, spikes = SpikeState(), []
    for step, loss in enumerate(losses):
        state, spike = observe(state, step, loss, 1.0, warm=step >= warm_from)
        if spike:
            spikes.append(spike)
            break
    return spikes, state


def test_a_loss_that_stays_far_above_the_window_is_a_spike() -> None:
    spikes, _ = seen([2.0, 1.9, 2.1] * 7 + [9.0, 9.5, 9.9])
    assert [(s.first, s.last) for s in spikes] == [(21 - WINDOW, 23)]
    assert "step 24" in spikes[0].sentence


def test_one_hard_batch_is_not_a_spike() -> None:
    assert seen([2.0, 1.9, 2.1] * 7 + [9.0, 9.5] + [2.0] * 5)[0] == []


def test_hard_batches_do_not_raise_the_bar() -> None:
    _, state = seen([2.0] * 10 + [9.0, 2.0, 9.0])
    assert all(loss == 2.0 for _, loss in state.window)


def test_nothing_is_a_spike_during_warm_up() -> None:
    assert seen([2.0] * 20 + [30.0] * 10, warm_from=100)[0] == []


def test_losses_that_are_not_finite_are_a_spike_even_in_warm_up() -> None:
    spikes, _ = seen([2.0, 2.0, math.nan, math.inf, math.nan], warm_from=100)
    assert [(s.first, s.last) for s in spikes] == [(0, 4)]
    assert "not finite" in spikes[0].sentence


def test_a_loss_that_barely_varies_is_not_judged_by_its_tiny_deviation() -> None:
    assert seen([0.01] * 20 + [0.05] * 5)[0] == []


def test_a_falling_loss_is_no_spike() -> None:
    assert seen([5.0 * 0.9**i for i in range(100)])[0] == []


def test_the_state_survives_json() -> None:
    _, state = seen([2.0] * 12 + [9.0])
    assert SpikeState.model_validate_json(state.model_dump_json()) == state
