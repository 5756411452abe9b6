"""What fields of `training` change in a whole training; tests/trainer/test_every_spec_field.py lists all fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.train.jobs import DatasetOf, Job, make_job, train

LENGTHS = [20, 31, 17, 44, 25, 60, 13, 38]
TRAINING: dict[str, Any] = {
    "globalBatchSize": 4,
    "maxSteps": 4,
    "learningRate": 5e-3,
    "validateEvery": 2,
    "validationRows": 4,
    "scheduler": {"warmupRatio": 0.25},
}
LEARNT_OTHERWISE: dict[str, Any] = {
    "learningRate": 1e-3,
    "globalBatchSize": 3,
    "seed": 7,
    "weightDecay": 5.0,
    "betas": [0.5, 0.9],
    "maxGradNorm": 0.001,
    "minLearningRateRatio": 0.9,
    "neftuneAlpha": 20,
    "labelSmoothing": 0.3,
    "lossReduction": "example",
    "precision": "bf16",
}


def trained(root: Path, model: Path, blocks: dict[str, Any] | None = None, **training: Any) -> Job:
    job = make_job(root, model, [DatasetOf("a", LENGTHS), DatasetOf("b", LENGTHS[:4], labelled=2)])
    job.configure(**{"training": {**TRAINING, **training}, **(blocks or {})})
    assert train(job) == [0]
    return job


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Job:
    """What the others are compared with."""
    return trained(tmp_path_factory.mktemp("plain"), model)


@pytest.mark.parametrize("field", LEARNT_OTHERWISE)
def test_a_field_that_decides_what_is_learnt_changes_the_losses(
    tmp_path: Path, model: Path, plain: Job, field: str
) -> None:
    job = trained(tmp_path, model, **{field: LEARNT_OTHERWISE[field]})
    assert job.losses() != plain.losses()
    assert job.export_digest() != plain.export_digest()


def test_lora_plus_teaches_b_faster(tmp_path: Path, model: Path) -> None:
    tuning = {"method": "lora", "lora": {"rank": 4, "bPlusRatio": 4}}
    slow, fast = (
        trained(tmp_path / str(i), model, {"tuning": t}, learningRate=1e-4)
        for i, t in enumerate(({**tuning, "lora": {"rank": 4}}, tuning))
    )
    assert fast.losses()[-1] < slow.losses()[-1]


def test_epochs_and_max_steps_count_the_steps(tmp_path: Path, model: Path, plain: Job) -> None:
    without = {key: value for key, value in TRAINING.items() if key != "maxSteps"}
    job = make_job(tmp_path, model, [DatasetOf("a", LENGTHS)])
    job.configure(training={**without, "epochs": 2.5})
    assert train(job) == [0]
    assert [row["epoch"] for row in job.rows()] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert len(plain.rows()) == 4


def test_validation_is_as_often_and_on_as_many_rows_as_the_spec_says(tmp_path: Path, model: Path, plain: Job) -> None:
    job = trained(tmp_path, model, validateEvery=1, validationRows=2)
    assert [row["step"] for row in plain.validations()] == [2, 4]
    assert [row["step"] for row in job.validations()] == [1, 2, 3, 4]
    assert job.validations()[1]["validation"]["loss"] != plain.validations()[0]["validation"]["loss"]
    assert job.losses() == plain.losses()


def worsening(root: Path, model: Path, **training: Any) -> Job:
    """A job whose validation gets worse from the first step on."""
    job = make_job(root, model, [DatasetOf("a", LENGTHS, contrary=True)])
    job.configure(training={**TRAINING, "maxSteps": 8, "validateEvery": 1, **training})
    assert train(job) == [0]
    assert job.validations()[0]["best"]
    assert not any(row["best"] for row in job.validations()[2:])
    return job


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_early_stopping_ends_training_and_the_best_step_is_exported(tmp_path: Path, model: Path, metric: str) -> None:
    job = worsening(tmp_path, model, earlyStopping={"metric": metric, "patience": 2})
    best = [row["step"] for row in job.validations() if row["best"]][-1]
    export = job.report().export
    assert export is not None
    assert export.step == best < job.rows()[-1]["step"] < 8
    assert export.step in job.saved()


def test_without_keep_best_the_last_step_is_exported(tmp_path: Path, model: Path) -> None:
    job = worsening(tmp_path, model, keepBest=False)
    export = job.report().export
    assert export is not None
    assert export.step == 8
    assert job.saved() == [0, 8]


def test_how_it_is_computed_is_in_the_report_and_changes_nothing(tmp_path: Path, model: Path, plain: Job) -> None:
    job = trained(tmp_path, model, activationCheckpointing=True, deterministic=True)
    assert {name: choice.value for name, choice in job.report().choices.items()} == {
        **{name: choice.value for name, choice in plain.report().choices.items()},
        "activationCheckpointing": "on",
        "deterministic": "on",
    }
    assert job.losses() == pytest.approx(plain.losses(), rel=1e-6)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(tmp_path: Path, model: Path, plain: Job) -> None:
    job = trained(tmp_path, model, compile=True)
    assert job.report().choices["compile"].value == "on"
    assert plain.report().choices["compile"].value == "off"
    assert job.losses() == pytest.approx(plain.losses(), rel=1e-4)


def test_a_row_without_a_plan_holds_the_longest_document_allowed(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, [DatasetOf("a", LENGTHS)], training={**TRAINING, "maxSequenceLength": 333})
    assert train(job, microBatchTokens=None) == [0]
    assert job.report().choices["microBatchTokens"].value == "333"
    assert train(job, microBatchTokens=10) == [0]
    choice = job.report().choices["microBatchTokens"]
    assert (choice.value, choice.why) == ("60", "from the memory plan; the longest example has 60 tokens")


def test_the_weights_of_datasets_change_what_is_learnt(tmp_path: Path, model: Path, plain: Job) -> None:
    for name, weights in {"weight": {"weight": 3.0}, "loss": {"loss_weight": 3.0}}.items():
        datasets = [DatasetOf("a", LENGTHS), DatasetOf("b", LENGTHS[:4], labelled=2, **weights)]
        job = make_job(tmp_path / name, model, datasets, training=TRAINING)
        assert train(job) == [0]
        assert job.losses() != plain.losses()


SHOWN = {
    **dict.fromkeys(LEARNT_OTHERWISE, test_a_field_that_decides_what_is_learnt_changes_the_losses),
    "epochs": test_epochs_and_max_steps_count_the_steps,
    "maxSteps": test_epochs_and_max_steps_count_the_steps,
    "maxSequenceLength": test_a_row_without_a_plan_holds_the_longest_document_allowed,
    "activationCheckpointing": test_how_it_is_computed_is_in_the_report_and_changes_nothing,
    "deterministic": test_how_it_is_computed_is_in_the_report_and_changes_nothing,
    "compile": test_compiled_layers_learn_the_same,
    "validateEvery": test_validation_is_as_often_and_on_as_many_rows_as_the_spec_says,
    "validationRows": test_validation_is_as_often_and_on_as_many_rows_as_the_spec_says,
    "keepBest": test_without_keep_best_the_last_step_is_exported,
}
"""Fields of `training`, and the test that shows the effect of each."""
