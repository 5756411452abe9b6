"""Evaluate compares the loss of the export, as users load it, with the loss that Train measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.batches import examples
from tests.support.evaluation_runs import EvaluationRun, evaluation_run
from tests.support.loading import load, tuning

from finetune_api.report import ExportProbe, FailureClass, Report
from finetune_trainer.data.documents import DocumentStore, DocumentWriter
from finetune_trainer.digest import export_digest, write_digest
from finetune_trainer.evaluate import stage
from finetune_trainer.evaluate.export_check import CHOICE, TOLERANCE, TOLERANCE_AFTER_4_BITS, _tolerance
from finetune_trainer.evaluate.models import ModelPair
from finetune_trainer.failures import TrainerError
from finetune_trainer.train.probe import DOCUMENTS, drawn, measure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EvaluationRun:
    """A run whose Train has measured its model on validation documents."""
    run = evaluation_run(tmp_path_factory.mktemp("run"), rows=2, steps=5)
    with DocumentWriter(run.path / "prepared/validation") as writer:
        for document in examples((9, 40, 17)):
            writer.add(document.ids, document.target_position, document.target_id)
    model = load(Path(run.manifest.model.directory), tuning(), adapter_directory=run.path / "export")
    store = DocumentStore(run.path / "prepared/validation")
    report(run, measure(model, store, "validation", 3, torch.device("cpu")))
    return run


def report(run: EvaluationRun, probe: ExportProbe | None) -> None:
    path = run.path / "reports/train-1.json"
    told = Report.model_validate_json(path.read_text())
    assert told.export is not None
    export = told.export.model_copy(update={"digest": export_digest(run.path / "export")})
    path.write_text(
        told.model_copy(update={"probe": probe or told.probe, "export": export}).model_dump_json(by_alias=True)
    )


def test_an_export_that_computes_what_was_trained_is_measured_and_both_losses_are_said(run: EvaluationRun) -> None:
    stage.run(run.context())
    choice = run.report().choices[CHOICE]
    assert choice.value == "equal"
    reloaded, trained = (float(part.split()[-1]) for part in choice.why.split(",")[:2])
    assert reloaded == pytest.approx(trained, abs=1e-4)
    assert "on 63 tokens of 3 documents" in choice.why
    assert choice.why in (run.path / "evaluation/report.html").read_text()


def test_an_export_that_lacks_something_is_never_measured_nor_published(run: EvaluationRun) -> None:
    path = run.path / "export/adapter_model.safetensors"
    whole = path.read_bytes()
    save_file({name: 0 * t if ".lora_B." in name else t for name, t in load_file(path).items()}, path)
    write_digest(run.path / "export")
    report(run, None)
    with pytest.raises(
        TrainerError, match=r"does not compute what was trained: its loss is .* Nothing will be published"
    ) as error:
        stage.run(run.context(number=2))
    assert error.value.failure_class is FailureClass.EXPORT_DIFFERS
    path.write_bytes(whole)
    write_digest(run.path / "export")


def test_a_run_without_a_measured_loss_says_so(run: EvaluationRun) -> None:
    path = run.path / "reports/train-1.json"
    told = path.read_text()
    path.write_text(Report.model_validate_json(told).model_copy(update={"probe": None}).model_dump_json(by_alias=True))
    context = run.context(number=3)
    stage.run(context)
    assert context.reporter.report.choices[CHOICE].value == "not done"
    path.write_text(told)


@pytest.mark.parametrize(
    ("adapter", "method", "dtype", "stored", "tolerance"),
    [
        (True, "lora", torch.float32, "bfloat16", TOLERANCE[torch.float32]),
        (True, "qlora", torch.bfloat16, "bfloat16", TOLERANCE[torch.bfloat16]),
        (False, "lora", torch.float32, "float32", TOLERANCE[torch.float32]),
        (False, "full", torch.float32, "bfloat16", TOLERANCE[torch.bfloat16]),
        (False, "qlora", torch.float32, "float32", TOLERANCE_AFTER_4_BITS),
    ],
)
def test_the_tolerance_is_that_of_the_least_exact_type(
    tmp_path: Path, run: EvaluationRun, adapter: bool, method: Any, dtype: torch.dtype, stored: str, tolerance: float
) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "dtype": "{stored}"}}')
    if adapter:
        (tmp_path / "adapter_config.json").touch()
    pair = ModelPair(tmp_path, run.manifest.model, tuning(method).method, dtype, torch.device("cpu"), (2,), 3, dtype)
    assert _tolerance(pair) == tolerance


def test_the_shortest_of_documents_from_everywhere_are_measured() -> None:
    lengths = np.array([1, *range(1000, 0, -1), 1])
    assert drawn(np.array([1, 1])) == drawn(np.array([])) == []
    assert drawn(np.array([1, 5, 2])) == [1, 2]
    assert len(drawn(lengths)) == DOCUMENTS
    assert max(lengths[index] for index in drawn(lengths)) < 40
