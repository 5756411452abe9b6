"""A gate that cannot be decided is refused before a GPU is taken, and the advice is one that works."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.support.prepare_runs import labelled, prepare_context, write_rows
from tests.support.tiny import tiny_llama

from finetune_api.report import FailureClass
from finetune_trainer.data.evaluation_rows import read_evaluation
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import preview, stage

GATE = {"gate": {"mustImprove": True}}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16, context=600)
    return tmp_path


def spec_for(work: Path, rows: list[Any], task: str = "classification", **fields: Any) -> dict[str, Any]:
    write_rows(work / "rows.jsonl", rows)
    whole = {"datasets": [{"name": "d", "path": "rows.jsonl", "task": task}]} | fields
    return whole | {"evaluation": GATE | fields.get("evaluation", {})}


def measured(work: Path, spec: dict[str, Any]) -> int:
    context = prepare_context(work, spec)
    stage.run(context)
    return len(list(read_evaluation(context.prepared / "evaluation/d.jsonl")))


def refusal(work: Path, spec: dict[str, Any]) -> str:
    with pytest.raises(TrainerError) as error:
        stage.run(prepare_context(work, spec))
    assert (error.value.failure_class, error.value.field) == (FailureClass.BAD_DATA, "evaluation.gate")
    return error.value.sentence


MANY_LABELS = [{"text": f"number {n} of {n // 2}", "label": f"{n // 2}"} for n in range(120)]
COPIES = [{"text": f"the same words again and again {n // 8}", "label": "ab"[n // 8 % 2]} for n in range(160)]


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (labelled(100), {}),
        (labelled(200), {"split": {"test": 0.01}}),
        (labelled(200), {"split": {"validation": 0.05}, "training": {"keepBest": False}}),
        (labelled(200), {"evaluation": {"maxRows": 12}}),
        (MANY_LABELS, {"split": {"validation": 0.1}}),
        (COPIES, {"split": {"validation": 0.1}}),
    ],
    ids=["small", "small test share", "small validation share", "maxRows", "two rows per label", "near-duplicates"],
)
def test_too_few_rows_are_refused_and_following_the_advice_makes_the_gate_decidable(
    work: Path, rows: list[Any], fields: dict[str, Any]
) -> None:
    spec = spec_for(work, rows, **fields)
    said = refusal(work, spec)
    assert "mustImprove needs at least 30 rows of each dataset" in said
    assert not (work / "run/prepared").exists()
    advised = re.search(r"set split: (\{.*?\})", said)
    if advised:
        spec["split"] = yaml.safe_load(advised[1])
    if "raise evaluation.maxRows to 30" in said:
        spec["evaluation"]["maxRows"] = 30
    assert advised or "maxRows" in said
    assert measured(work, spec) >= 30


def test_a_small_dataset_is_measured_by_default_and_says_what_is_held_out(work: Path) -> None:
    context = prepare_context(work, spec_for(work, labelled(150)))
    stage.run(context)
    [facts] = context.reporter.report.datasets
    assert (facts.train, facts.validation, facts.test) == (90, 30, 30)
    assert any("40% of the rows are held out instead of 20%" in note for note in facts.notes)


def test_labels_with_one_held_out_row_each_are_halved_too(work: Path) -> None:
    assert measured(work, spec_for(work, MANY_LABELS)) == 30


def test_texts_count_by_what_is_scored_of_them(work: Path) -> None:
    long = [{"text": f"text {n} " + "on and on " * 2000} for n in range(10)]
    assert measured(work, spec_for(work, long, "text")) >= 30


def test_preview_shows_its_examples_and_then_refuses_the_gate(work: Path) -> None:
    out = io.StringIO()
    with pytest.raises(TrainerError, match="The gate cannot be decided: 4 of d would be measured"):
        preview.run(prepare_context(work, spec_for(work, labelled(40))), Console(file=out, width=200))
    assert out.getvalue().count("Classify the text") == 3


def test_preview_counts_the_pieces_of_texts(work: Path) -> None:
    long = [{"text": f"text {n} " + "on and on " * 2000} for n in range(10)]
    preview.run(prepare_context(work, spec_for(work, long, "text")), Console(file=io.StringIO()))
