"""Weights & Biases: one run for all attempts, and never a reason for training to stop."""

from __future__ import annotations

import ast
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.trainer.train.jobs import DatasetOf, Job, make_job, train

from finetune_trainer.train.tracking import TrackedEvaluation, WandbTracker

TRAINING = {"globalBatchSize": 4, "maxSteps": 4, "validateEvery": 2, "learningRate": 1e-3}
KEY = "wandb_v1_SecretKeyThatMustNotShow0123456789"


def tracked(root: Path, model: Path, **wandb: Any) -> Job:
    job = make_job(root, model, [DatasetOf("a", [20, 31, 17, 44, 25, 60])])
    private = {
        "podTemplate": {"env": [{"name": "TEAM_SECRET", "value": "x"}]},
        "credentials": {"hub": {"name": "ours"}},
    }
    job.configure(training=TRAINING, tracking={"wandb": {"project": "tests", **wandb}}, **private)
    (root / "tokens").mkdir()
    (root / "tokens" / "wandb").write_text(KEY)
    return job


def with_environment(variables: dict[str, str], recorded: str = "") -> None:
    """Set environment variables; with `recorded`, a stand-in for W&B writes what it is told into that file."""
    import os

    os.environ.update(variables)
    if recorded:
        import wandb

        wandb.init = partial(_recording_init, Path(recorded))  # type: ignore[assignment]


def _recording_init(file: Path, **arguments: Any) -> Any:
    class Run:
        url = "https://wandb.example/run"

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self._note(("metric", name, step_metric))

        def log(self, row: dict[str, Any]) -> None:
            if "evaluation" in row:
                self._note(("table", row["evaluation"].columns, row["evaluation"].data))
            else:
                self._note(("row", sorted(row), row["train/step"]))

        @property
        def summary(self) -> Any:
            return SimpleNamespace(update=lambda values: self._note(("summary", values)))

        def finish(self) -> None:
            self._note(("finish",))

        def _note(self, what: object) -> None:
            with file.open("a") as lines:
                lines.write(f"{what}\n")

    run = Run()
    run._note(
        ("init", arguments["id"], arguments["resume"], arguments["project"], arguments["settings"].api_key == KEY)
    )
    run._note(("config", sorted(arguments["config"])))
    return run


def test_one_run_has_the_curves_of_all_attempts(tmp_path: Path, model: Path) -> None:
    job, told = tracked(tmp_path, model), tmp_path / "told"
    hook = partial(with_environment, {"FINETUNE_TOKENS": str(tmp_path / "tokens")}, str(told))
    assert train(job, 2, hook) == [0, 0]
    lines = told.read_text().splitlines()
    assert lines[0] == "('init', 'uid-1', 'allow', 'tests', True)"
    _, config = ast.literal_eval(lines.pop(1))
    assert "training" in config
    assert not {"podTemplate", "credentials"} & set(config), "names of Secrets and values of variables stay here"
    assert lines[1:3] == ["('metric', 'train/step', None)", "('metric', '*', 'train/step')"]
    rows = [line for line in lines if line.startswith("('row'")]
    assert sum("train/loss" in row for row in rows) == 4
    assert sum("validation/loss" in row and row.endswith("2)") for row in rows) == 1
    assert lines[-1] == "('finish',)"
    _, columns, table = ast.literal_eval(lines[-3])
    assert columns == ["train/step", "exported", "dataset", "documents", "loss", "accuracy"]
    assert [line[:4] for line in table] == [[2, False, "a", 6], [4, True, "a", 6]]
    _, summary = ast.literal_eval(lines[-2])
    assert summary == {"exported/step": 4, "exported/a/loss": table[1][4], "exported/a/accuracy": table[1][5]}
    assert table[1][4] == pytest.approx(job.validations()[1]["validation"]["loss"])
    assert job.report().wandb_url == "https://wandb.example/run"
    assert job.report().warnings == []


def test_an_unreachable_server_costs_a_warning_and_the_key_is_nowhere(tmp_path: Path, model: Path) -> None:
    job = tracked(tmp_path, model)
    environment = {"FINETUNE_TOKENS": str(tmp_path / "tokens"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    assert train(job, 1, partial(broken, environment)) == [0]
    assert len(job.rows()) == 4
    warnings = job.report().warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("W&B ")
    for file in (path for path in job.run.rglob("*") if path.is_file()):
        assert KEY.encode() not in file.read_bytes()


def broken(environment: dict[str, str]) -> None:
    """W&B cannot be reached, and gives up soon."""
    with_environment(environment)
    from finetune_trainer.train import stage, tracking

    stage.WandbTracker = partial(tracking.WandbTracker, init_seconds=3)  # type: ignore[misc, assignment]
    tracking.FINISH_SECONDS = 5.0


def test_without_a_key_nothing_is_tracked_and_that_is_said(tmp_path: Path, model: Path) -> None:
    job = tracked(tmp_path, model)
    assert train(job) == [0]
    assert job.report().warnings == [
        "W&B is off: there is no API key (credentials.wandb, or WANDB_API_KEY on this machine)."
    ]


def test_offline_writes_the_run_beside_the_logs(tmp_path: Path, model: Path) -> None:
    job = tracked(tmp_path, model, mode="offline")
    assert train(job) == [0]
    assert list((job.run / "wandb").rglob("*.wandb"))
    assert job.report().warnings == []


def test_a_tracker_that_never_answers_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    waits = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **arguments: waits.wait(30))
    tracker = WandbTracker(
        project="p", entity=None, mode="online", run_id="r", name="n", config={}, directory=tmp_path, api_key=KEY
    )
    for step in range(1000):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(TrackedEvaluation([], {}), timeout_seconds=0.05)
    assert tracker.problem == "W&B did not accept the last rows within 0 s."
    waits.set()
