"""Runs that several tests read; those that change something copy them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.evaluation_runs import EvaluationRun, evaluation_run

from finetune_api.files import write_json
from finetune_api.runconfig import Paths
from finetune_api.traits import Task
from finetune_trainer.evaluate import stage

MIXED = (Task.CLASSIFICATION, Task.MULTIPLE_CHOICE, Task.QUESTION_ANSWERING, Task.SUMMARIZATION, Task.CHAT)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> EvaluationRun:
    """Trained on five tasks, not evaluated yet."""
    changes = {"spec.evaluation": {"maxNewTokens": 8, "prompts": ["How is: sun day?"], "metrics": ["perplexity"]}}
    return evaluation_run(tmp_path_factory.mktemp("mixed"), tasks=MIXED, rows=40, changes=changes, few_shot=2)


@pytest.fixture(scope="session")
def evaluated(prepared: EvaluationRun) -> EvaluationRun:
    """The same, evaluated."""
    stage.run(prepared.context())
    return prepared


@pytest.fixture
def changed(prepared: EvaluationRun, tmp_path: Path) -> Callable[..., EvaluationRun]:
    """Makes a copy of the run with other fields of the spec: `changed(evaluation={"baseline": False})`."""

    def make(**spec: dict[str, Any]) -> EvaluationRun:
        run = tmp_path / "run"
        shutil.copytree(prepared.path, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("evaluat*-1.json"))
        shutil.rmtree(run / "evaluation", ignore_errors=True)
        wire = prepared.config.spec.to_wire()
        for name, fields in spec.items():
            wire[name] = {**dict(wire.get(name) or {}), **fields}  # type: ignore[call-overload]
        paths = Paths(run=str(run), cache=str(tmp_path), source=str(tmp_path))
        config = prepared.config.model_validate(prepared.config.to_wire() | {"spec": wire, "paths": paths.to_wire()})
        write_json(run / "run-config.json", config.to_wire())
        return EvaluationRun(config, prepared.manifest)

    return make
