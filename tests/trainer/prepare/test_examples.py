"""Every example is planned, and shown as the model will see it, with the data that it names."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.support.assets import fetch, smollm2_directory

from finetune_api.base import Stage
from finetune_api.runconfig import Attempt, JobRef, Paths, RunConfig, resolve
from finetune_api.spec import FineTuneJob
from finetune_api.traits import Method, Task
from finetune_operator.cli import run_command_line
from finetune_trainer.context import RunContext
from finetune_trainer.prepare import preview
from finetune_trainer.reporter import Reporter

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
LOCAL = [file for file in EXAMPLES if "path: assets/" in file.read_text()]


def jobs() -> Iterator[FineTuneJob]:
    """All examples."""
    for file in EXAMPLES:
        for document in yaml.safe_load_all(file.read_text()):
            yield FineTuneJob.model_validate(document)


def assets_of(file: Path) -> set[str]:
    """Names of the packaged data that an example reads, `tweets` for `path: assets/tweets/…`."""
    spec = yaml.safe_load(file.read_text())["spec"]
    sources = [spec["model"], *spec["datasets"]]
    return {Path(source["path"]).parts[1] for source in sources if source.get("path", "").startswith("assets/")}


def test_there_is_an_example_of_every_task_and_of_every_method() -> None:
    assert {dataset.task for job in jobs() for dataset in job.spec.datasets} == set(Task)
    assert {job.spec.tuning.method for job in jobs()} == set(Method)
    adapters = [job.spec.tuning.lora for job in jobs()]
    assert any(lora.dora for lora in adapters)
    assert any(lora.rslora for lora in adapters)
    assert any(lora.init == "pissa" for lora in adapters)
    assert any(lora.b_plus_ratio > 1 for lora in adapters)


@pytest.mark.parametrize("file", LOCAL, ids=lambda file: file.stem)
def test_an_example_says_what_to_fetch_and_when_to_use_it(file: Path) -> None:
    comment = file.read_text().partition("apiVersion")[0]
    if file.stem != "quickstart":  # `make run` fetches its data
        command = comment.partition("fetch_assets.py ")[2].partition("`")[0]
        assert set(command.split()) == assets_of(file)
    assert len(comment.splitlines()) >= 2


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_planned_without_a_warning_of_too_few_steps(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in assets_of(file):
        fetch(name)
    assert run_command_line(["plan", str(file)]) == 0
    said = capsys.readouterr().out
    assert "Steps" in said
    assert "too few for the learning-rate schedule" not in said


@pytest.mark.parametrize("file", LOCAL, ids=lambda file: file.stem)
def test_an_example_is_shown_as_the_model_will_see_it(file: Path, tmp_path: Path) -> None:
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    assets = {name: fetch(name) for name in assets_of(file)}
    document["spec"]["model"]["path"] = str(smollm2_directory())  # reads quicker than the GGUF that it was made of
    spec = resolve(FineTuneJob.model_validate(document).spec)
    cache = next(iter(assets.values())).parents[2]
    config = RunConfig(
        job=JobRef(namespace="default", name=file.stem, uid="uid-1"),
        spec=spec,
        paths=Paths(run=str(tmp_path), cache=str(cache), source=str(file.parent)),
    )
    attempt = Attempt(uid="uid-1", stage=Stage.PREPARE)
    out = io.StringIO()
    context = RunContext(config, attempt, Reporter(attempt, tmp_path / "reports", enabled=True))
    preview.run(context, Console(file=out, width=200))
    shown = out.getvalue()
    for dataset in spec.datasets:
        assert f"{dataset.name}: {dataset.task}" in shown
    assert shown.count("⟦") >= 3 * len(spec.datasets)
