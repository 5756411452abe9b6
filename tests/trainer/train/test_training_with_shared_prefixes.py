"""A training computes what examples have in common once, and learns the same; killed, it goes on to the same bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.train.hooks import at_step, divisions_counted
from tests.trainer.train.jobs import DatasetOf, Job, make_job, train

from finetune_api.report import EXIT_CODES, FailureClass

UNEVEN = [50, 46, 61, 44, 58, 60, 47, 52, 49, 70, 45, 80]
TRAINING: dict[str, Any] = {"globalBatchSize": 8, "maxSteps": 5, "learningRate": 2e-3, "validateEvery": 5}


def a_job(root: Path, model: Path, tuning: dict[str, Any] | None = None, **training: Any) -> Job:
    """Two tasks with an instruction each, and documents that have nothing in common."""
    datasets = [
        DatasetOf("a", UNEVEN, labelled=3, prefix=40),
        DatasetOf("b", UNEVEN[:6], labelled=1, prefix=40, loss_weight=2),
        DatasetOf("c", [20, 31, 17], labelled=8),
    ]
    job = make_job(root, model, datasets)
    job.configure(
        tuning=tuning or {"method": "lora", "lora": {"rank": 4}},
        training={**TRAINING, **training},
        checkpoint={"everyMinutes": 0},
    )
    return job


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_validations_are_those_without_sharing(tmp_path: Path, model: Path, method: str, ranks: int) -> None:
    shared, apart = (
        a_job(tmp_path / str(share), model, {"method": method, "lora": {"rank": 4}}, sharedPrefixes=share)
        for share in (None, False)
    )
    assert train(shared, ranks) == train(apart, ranks) == [0] * ranks
    assert shared.losses() == pytest.approx(apart.losses(), rel=1e-5)
    norms = [[row["gradNorm"] for row in job.rows()] for job in (shared, apart)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    seen = [[row["validation"]["loss"] for row in job.validations()] for job in (shared, apart)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    assert [row["tokens"] for row in shared.rows()] == [row["tokens"] for row in apart.rows()]
    assert all(row["computedTokens"] < 0.8 * row["tokens"] for row in shared.rows())
    assert all(row["computedTokens"] == row["tokens"] for row in apart.rows())
    choices = [job.report().choices["sharedPrefixes"] for job in (shared, apart)]
    assert [choice.value for choice in choices] == ["on", "off"]
    assert "of the tokens are computed" in choices[0].why


def test_a_killed_training_goes_on_to_the_same_bytes_and_may_switch_it_off(tmp_path: Path, model: Path) -> None:
    whole, killed, switched = (a_job(tmp_path / name, model) for name in ("whole", "killed", "switched"))
    assert train(whole, 2) == [0, 0]
    for job in (killed, switched):
        assert -9 in train(job, 2, partial(at_step, 3, "SIGKILL", (0, 1)))
    switched.configure(training={**TRAINING, "sharedPrefixes": False})
    assert train(killed, 2) == train(switched, 2) == [0, 0]
    assert killed.losses() == whole.losses()
    assert killed.export_digest() == whole.export_digest()
    assert switched.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_a_step_is_divided_into_rows_once_and_what_is_held_out_once_a_run(tmp_path: Path, model: Path) -> None:
    job, divided = a_job(tmp_path, model, sharedPrefixes=False, validateEvery=1), tmp_path / "divided"
    assert train(job, 1, partial(divisions_counted, divided)) == [0]
    assert len(job.validations()) == 5
    assert len(divided.read_text().splitlines()) == 5 + 1


def test_rows_become_longer_where_prefixes_would_repeat_in_every_row(tmp_path: Path, model: Path) -> None:
    training = {**TRAINING, "globalBatchSize": 24, "maxSteps": 2}
    long, short = (
        make_job(tmp_path / str(n), model, [DatasetOf("a", [n] * 24, labelled=2, prefix=50)], training=training)
        for n in (56, 70)
    )
    assert train(long, microBatchTokens=100) == [0]
    choice = long.report().choices["microBatchTokens"]
    assert choice.value == "200"
    assert choice.why.startswith("doubled, since prefixes repeat in fewer rows: 34% fewer tokens are computed")
    assert [row["computedTokens"] for row in long.rows()] == [50 + 24 * 6] * 2
    assert train(short, microBatchTokens=1000) == [0]
    assert short.report().choices["microBatchTokens"].value == "1000"


def test_asked_for_where_it_cannot_be_exact_it_is_refused(tmp_path: Path, model: Path) -> None:
    job = a_job(tmp_path, model, sharedPrefixes=True)
    job.configure(model={"path": str(model), "attention": "eager"})
    assert train(job) == [EXIT_CODES[FailureClass.BAD_SPEC]]
    failure = job.report().failure
    assert failure is not None
    assert failure.field == "training.sharedPrefixes"
    assert "eager attention does not support it" in failure.sentence
