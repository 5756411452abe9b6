"""One evaluated run for all tests of Publish, copied where a test changes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.evaluation_runs import EvaluationRun, evaluated_run
from tests.support.hub_server import HubServer, hub_in_this_process

from finetune_api.files import write_json
from finetune_api.runconfig import Paths


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluationRun:
    """A run that passed the gate."""
    run = evaluated_run(tmp_path_factory.mktemp("evaluated"))
    assert run.report().results is not None
    assert run.report().results.gate.passed
    return run


@pytest.fixture
def published_run(evaluated: EvaluationRun, tmp_path: Path) -> Callable[..., EvaluationRun]:
    """Makes a copy of the run with another `publish` in its spec."""

    def make(**publish: Any) -> EvaluationRun:
        root = tmp_path / "job"
        shutil.copytree(evaluated.path, root / "run", dirs_exist_ok=True)
        spec = evaluated.config.spec.to_wire() | {"publish": publish}
        paths = Paths(run=str(root / "run"), cache=str(root / "cache"), source=str(root))
        config = evaluated.config.model_validate(evaluated.config.to_wire() | {"spec": spec, "paths": paths.to_wire()})
        write_json(root / "run/run-config.json", config.to_wire())
        return EvaluationRun(config, evaluated.manifest)

    return make


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub for this test alone, with a reader and a writer."""
    with HubServer() as server, hub_in_this_process(server, tmp_path / "home"):
        server.add_token("hf_reader0001", user="alice")
        server.add_token("hf_writer0001", user="bob", write=True, orgs=("acme",))
        yield server


@pytest.fixture
def tokens(tmp_path: Path) -> Callable[[str], Path]:
    """A directory with a publish token, as the stage sees it."""

    def make(token: str) -> Path:
        directory = tmp_path / "tokens"
        directory.mkdir(exist_ok=True)
        (directory / "publish").write_text(token + "\n")
        return directory

    return make
