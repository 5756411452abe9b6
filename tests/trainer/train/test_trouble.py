"""What goes wrong in the midst of training: gradients that are not finite, spikes, memory, a rank that stops."""

from __future__ import annotations

import math
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
from tests.support.time_limits import scaled
from tests.trainer.train.hooks import at_step, loss_jumps, out_of_memory, poisoned
from tests.trainer.train.jobs import DatasetOf, Job, make_job, start, train

from finetune_api.report import EXIT_CODES, Failure, FailureClass
from finetune_trainer.train.watchdog import Heartbeat, who_is_missing

LENGTHS = [20, 31, 17, 44, 25, 60, 13, 38]
TRAINING = {"globalBatchSize": 4, "maxSteps": 4, "validateEvery": 100, "learningRate": 1e-3}


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    job = make_job(tmp_path, model, [DatasetOf("a", LENGTHS)])
    job.configure(training=TRAINING)
    return job


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_whose_gradients_are_not_finite_on_one_rank_is_skipped_on_all(job: Job, factor: float) -> None:
    job.configure(training={**TRAINING, "maxSteps": 3}, checkpoint={"everyMinutes": 0})
    assert train(job, 2, partial(poisoned, (1,), factor, 1)) == [0, 0]
    rows = job.rows()
    assert [row["gradNorm"] is None for row in rows] == [False, True, False]
    assert job.report().warnings == ["Step 2 was skipped: its gradients are not finite."]
    assert all(math.isfinite(row["loss"]) for row in (rows[0], rows[2]))
    weights = [(job.checkpoints / f"step-{step:08d}" / "__1_0.distcp").read_bytes() for step in (1, 2, 3)]
    assert weights[0] == weights[1] != weights[2]


def test_a_spike_leads_back_before_it_and_its_steps_are_left_out(tmp_path: Path, model: Path) -> None:
    job, other = (make_job(tmp_path / name, model, [DatasetOf("a", LENGTHS)]) for name in ("job", "other"))
    for one in (job, other):
        one.configure(training={**TRAINING, "maxSteps": 24}, checkpoint={"everyMinutes": 0, "keep": 2})
    spike = partial(loss_jumps, (18, 19, 20))
    assert train(job, 2, spike) == [0, 0]
    # the window holds steps 3 to 18: back to a checkpoint from before it, and on without steps 3 to 21
    assert [row["step"] for row in job.rows()] == [1, 2, 22, 23, 24]
    assert len(job.report().warnings) == 1
    assert "rolled back to the checkpoint of step 1; steps 3 to 21 are skipped" in job.report().warnings[0]
    # killed after the roll-back, it goes on with the same steps left out
    assert -9 in train(other, 2, partial(spike_then_kill, 22))
    assert train(other, 2) == [0, 0]
    assert (other.report().resumed_from_step or 0) >= 2
    assert other.losses() == job.losses()
    assert other.export_digest() == job.export_digest()


def spike_then_kill(step: int) -> None:
    """A spike, and the end of all ranks some steps after it."""
    loss_jumps((18, 19, 20))
    at_step(step, "SIGKILL", (0, 1))


def test_the_third_spike_ends_training_with_the_examples_named(job: Job) -> None:
    job.configure(training={**TRAINING, "maxSteps": 70})
    jumps = (20, 21, 22, 40, 41, 42, 60, 61, 62)
    assert train(job, 1, partial(loss_jumps, jumps)) == [EXIT_CODES[FailureClass.DIVERGED]]
    failure = job.report().failure
    assert failure is not None
    assert "after 2 rollbacks" in failure.sentence
    assert "a row " in failure.sentence
    assert failure.field == "training.learningRate"


def test_gpu_memory_that_runs_out_shows_before_the_first_step(job: Job) -> None:
    assert train(job, 1, out_of_memory) == [EXIT_CODES[FailureClass.CUDA_OOM]]
    assert job.rows() == []
    failure = job.report().failure
    assert failure is not None
    assert failure.sentence.startswith("Out of GPU memory: CUDA out of memory.")


def test_the_watchdog_names_the_rank_that_was_stopped(job: Job) -> None:
    job.configure(training={**TRAINING, "maxSteps": 100})
    hang, startup = math.ceil(scaled(3)), math.ceil(scaled(30))
    ranks = start(job, 2, partial(at_step, 60, "SIGSTOP", (1,)), hangSeconds=hang, startupSeconds=startup)
    ranks.processes[0].join(scaled(60))
    try:
        assert ranks.processes[0].exitcode == EXIT_CODES[FailureClass.HANG]
    finally:
        os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
        ranks.wait()
    logs = job.run / "logs" / "train-1"
    failure = Failure.model_validate_json((logs / "failure-rank0.json").read_text())
    assert failure.sentence.startswith(f"No progress for {hang} s. Rank 1 is not responding; its last heartbeat was ")
    assert re.search(r"s ago, in step \d+ \(", failure.sentence)
    stacks = (logs / "stacks-rank0.txt").read_text()
    assert "_accumulate" in stacks or "_optimise" in stacks


def test_a_rank_that_its_own_code_aborts_leaves_the_stacks_of_its_threads(job: Job) -> None:
    assert train(job, 1, partial(at_step, 2, "SIGABRT")) == [-signal.SIGABRT]
    stacks = (job.run / "logs" / "train-1" / "stacks-rank0.txt").read_text()
    assert "Fatal Python error: Aborted" in stacks
    assert "loop.py" in stacks
    for core in job.run.glob("core*"):
        core.unlink()


def beat(step: int, phase: int = 0, activity: str = "data", time: float = 100.0) -> Heartbeat:
    return Heartbeat(step, phase, activity, time)


@pytest.mark.parametrize(
    ("beats", "sentence"),
    [
        (
            {0: beat(7, 3, "all-reduce"), 1: beat(7, 1, "micro-batch 1 of 2")},
            "Rank 1 is behind: in step 7 (micro-batch 1 of 2), others in step 7 (all-reduce).",
        ),
        (
            {0: beat(7), 1: beat(6, time=40.0), 2: beat(7)},
            "Rank 1 is not responding; its last heartbeat was 61 s ago, in step 6 (data).",
        ),
        ({0: beat(0, 0, "loading"), 1: None}, "Rank 1 is not responding; it has never sent a heartbeat."),
        ({0: beat(7), 1: beat(7)}, "All ranks are at the same place, in step 7 (data); see their stack traces."),
    ],
)
def test_who_is_missing(beats: dict[int, Heartbeat | None], sentence: str) -> None:
    assert who_is_missing(beats, stale_seconds=5.0, now=101.0) == sentence
