"""A training that was interrupted ends like one that was not."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.train.hooks import at_step, lag
from tests.trainer.train.jobs import DatasetOf, Job, make_job, start, train

from finetune_api.report import EXIT_CODES, FailureClass
from finetune_api.spec import Quantization
from finetune_trainer.model.nf4 import write_nf4_copy

UNEVEN = [20, 31, 17, 44, 25, 60, 13, 38, 29, 41, 9, 80]
TRAINING = {"globalBatchSize": 5, "maxSteps": 7, "validateEvery": 3, "learningRate": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 4, "dropout": 0.1, "bPlusRatio": 4}},
    "bf16": {"method": "lora", "lora": {"rank": 4}},
    "qlora": {"method": "qlora", "lora": {"rank": 4}},
    "dora": {"method": "lora", "lora": {"rank": 4, "dora": True}},
    "pissa": {"method": "lora", "lora": {"rank": 4, "init": "pissa"}},
    "prompt": {"method": "prompt", "prompt": {"virtualTokens": 4}},
    "prefix": {"method": "prefix", "prefix": {"virtualTokens": 4}},
}


def a_job(root: Path, model: Path, tuning: dict[str, Any] | None = None, **training: Any) -> Job:
    nf4 = root / "nf4" if tuning and tuning["method"] == "qlora" else None
    if nf4 is not None:
        write_nf4_copy(model, nf4, Quantization())
    job = make_job(root, model, [DatasetOf("a", UNEVEN), DatasetOf("b", UNEVEN[:5], weight=1.6)], nf4=nf4)
    job.configure(
        tuning=tuning or METHODS["lora"], training={**TRAINING, **training}, checkpoint={"everyMinutes": 0, "keep": 2}
    )
    return job


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_goes_on_to_the_same_losses_and_the_same_bytes(
    tmp_path: Path, model: Path, name: str
) -> None:
    training = {"neftuneAlpha": 2, "precision": "bf16" if name == "bf16" else "fp32"}
    whole, killed = (a_job(tmp_path / part, model, METHODS[name], **training) for part in ("whole", "killed"))
    assert train(whole, 2) == [0, 0]
    assert -9 in train(killed, 2, partial(at_step, 5, "SIGKILL", (0, 1)))
    assert train(killed, 2) == [0, 0]
    resumed = killed.report().resumed_from_step
    assert resumed is not None
    assert 0 < resumed < 7
    assert killed.losses() == whole.losses()
    assert [row["validation"] for row in killed.validations()] == [row["validation"] for row in whole.validations()]
    assert [row["step"] for row in killed.rows()] == list(range(1, 8))
    assert killed.export_digest() == whole.export_digest()


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path, model: Path) -> None:
    whole, killed = (a_job(tmp_path / part, model, maxSteps=30) for part in ("whole", "killed"))
    assert train(whole, 2) == [0, 0]
    moments = random.Random(11)
    for target in sorted(moments.choices(range(28), k=10)):
        ranks = start(killed, 2)
        while killed.steps_done() < target and ranks.alive:
            ranks.processes[0].join(0.01)
        ranks.processes[0].join(moments.uniform(0, 0.1))
        assert ranks.alive
        ranks.kill()
    assert train(killed, 2) == [0, 0]
    assert killed.losses() == whole.losses()
    assert killed.export_digest() == whole.export_digest()
    assert not [path for path in killed.checkpoints.iterdir() if path.suffix]


def test_another_number_of_ranks_may_go_on(tmp_path: Path, model: Path) -> None:
    whole, moved = (a_job(tmp_path / part, model, METHODS["full"]) for part in ("whole", "moved"))
    assert train(whole, 2) == [0, 0]
    assert -9 in train(moved, 2, partial(at_step, 2, "SIGKILL", (0, 1)))
    assert -9 in train(moved, 1, partial(at_step, 4, "SIGKILL", (0,)))
    assert train(moved, 3) == [0, 0, 0]
    assert moved.report().resumed_from_step is not None
    assert moved.losses() == pytest.approx(whole.losses(), rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Job:
    """A training on two ranks that nothing interrupted."""
    job = a_job(tmp_path_factory.mktemp("whole"), model)
    assert train(job, 2) == [0, 0]
    return job


def test_sigterm_on_one_rank_saves_on_all_and_the_next_attempt_goes_on_from_there(
    tmp_path: Path, model: Path, whole: Job
) -> None:
    stopped = a_job(tmp_path, model)
    stopped.configure(checkpoint={"everyMinutes": 1000})
    assert train(stopped, 2, partial(at_step, 3, "SIGTERM", (1,))) == [EXIT_CODES[FailureClass.PREEMPTED]] * 2
    failure = stopped.report().failure
    assert failure is not None
    assert failure.sentence == "Stopped by a signal after the checkpoint of step 4; the next attempt resumes there."
    assert stopped.saved()[-1] == 4
    stopped.configure(checkpoint={"everyMinutes": 0, "keep": 2})
    assert train(stopped, 2) == [0, 0]
    assert stopped.report().resumed_from_step == 4
    assert stopped.losses() == whole.losses()
    assert stopped.export_digest() == whole.export_digest()


def test_results_read_one_step_late_as_on_a_gpu_change_nothing(tmp_path: Path, model: Path, whole: Job) -> None:
    late = a_job(tmp_path, model)
    late.configure(checkpoint={"everyMinutes": 1000})
    assert train(late, 2, partial(late_and_stopped, 3)) == [EXIT_CODES[FailureClass.PREEMPTED]] * 2
    assert late.saved()[-1] == 5
    assert train(late, 2, partial(lag, 1)) == [0, 0]
    assert late.losses() == whole.losses()
    assert late.export_digest() == whole.export_digest()


def late_and_stopped(step: int) -> None:
    """SIGTERM on rank 0, whose wish is read one step later."""
    lag(1)
    at_step(step, "SIGTERM", (0,))


def test_a_finished_training_only_exports_again(tmp_path: Path, model: Path) -> None:
    job = a_job(tmp_path, model)
    assert train(job, 1) == [0]
    first, rows = job.export_digest(), job.rows()
    assert train(job, 1) == [0]
    assert job.report().resumed_from_step == 7
    assert job.rows() == rows
    assert job.export_digest() == first


def test_another_job_starts_from_the_weights_of_a_checkpoint(tmp_path: Path, model: Path, whole: Job) -> None:
    second = a_job(tmp_path / "second", model)
    path = str(whole.checkpoints / "step-00000007")
    second.configure(training={**TRAINING, "learningRate": 5e-4, "resumeFrom": {"path": path}})
    assert train(second) == [0]
    assert second.report().resumed_from_step is None
    assert len(second.rows()) == 7
    assert second.losses()[0] < whole.losses()[0]

    other = a_job(tmp_path / "other", model, {"method": "lora", "lora": {"rank": 8, "dropout": 0.2}})
    other.configure(training={**TRAINING, "resumeFrom": {"path": path}})
    assert train(other) == [EXIT_CODES[FailureClass.CONFIG_CHANGED]]
    failure = other.report().failure
    assert failure is not None
    assert failure.field == "tuning.lora.rank"
    other.configure(tuning=METHODS["lora"], training={**TRAINING, "resumeFrom": {"path": str(tmp_path)}})
    assert train(other) == [EXIT_CODES[FailureClass.BAD_SPEC]]
