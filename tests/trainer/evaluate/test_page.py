"""The page: everything in one file, nothing from elsewhere, nobody's markup but ours."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.evaluation_runs import EvaluationRun

from finetune_api.base import Stage
from finetune_api.report import Failure, FailureClass, Interval, Results
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.evaluate.compare import DatasetAnswers, compare
from finetune_trainer.evaluate.gate import decide_gate
from finetune_trainer.evaluate.metrics import Answer
from finetune_trainer.evaluate.page.build import PromptAnswers, ReportData, curves, page_html, smoothed
from finetune_trainer.evaluate.page.charts import Level, Series, heatmap, level_chart, line_chart, number, ticks
from finetune_trainer.reports import read_metrics, read_reports

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)> </svg> {{ 7*7 }} '"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def data(run: EvaluationRun, labels: list[str], words: str) -> ReportData:
    random = np.random.default_rng(0)
    rows = [
        EvaluationRow(f"d/{i}", "classification", "classification", text=f"{words} {i}", candidates=labels, gold=i % 3)
        for i in range(60)
    ]
    said = [random.integers(0, len(labels), 60), np.arange(60) % 3]
    base, tuned = ([Answer(text=labels[c], choice=int(c)) for c in choices] for choices in said)
    answered = [DatasetAnswers("classification", rows[0].task, rows, tuned, base, {"majority": base})]  # type: ignore[arg-type]
    answered = [replace(answered[0], task=run.manifest.datasets[0].task)]
    compared = compare(answered, [])
    metrics = [one.result for one in compared]
    gate = decide_gate(run.config.spec.evaluation.gate, metrics, baseline=True)
    reports = read_reports(run.path / "reports")
    failed = reports[-1][1].model_copy(
        update={
            "done": False,
            "stage": Stage.TRAIN,
            "resumed_from_step": 20,
            "warnings": [words],
            "failure": Failure(failure_class=FailureClass.CUDA_OOM, sentence=words, time=datetime.now(UTC)),
        }
    )
    return ReportData(
        config=run.config,
        manifest=run.manifest,
        results=Results(split="test", metrics=metrics, gate=gate, export_digest="0" * 64),
        answered=answered,
        compared=compared,
        prompted=[PromptAnswers(words, words, words)],
        reports=[*reports, (2, failed)],
        metrics=read_metrics(run.path / "metrics/train.jsonl"),
        origin={"model": {"source": words}},
        created=datetime(2026, 1, 2, tzinfo=UTC),
    )


def test_a_strangers_words_are_shown_and_never_carried_out(prepared: EvaluationRun) -> None:
    page = Page(page_html(data(prepared, [HOSTILE, "b", "c"], HOSTILE)))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert(1)" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "49" not in re.findall(r"'(\d+)'", page.text)


def test_the_page_loads_nothing_and_forbids_scripts(evaluated: EvaluationRun) -> None:
    html = (evaluated.path / "evaluation/report.html").read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href", "action", "xlink:href")]
    assert "url(" not in html
    assert "@import" not in html
    assert any("default-src 'none'" in value for _, value in page.attributes)


def test_the_page_tells_the_verdict_the_numbers_and_where_they_come_from(evaluated: EvaluationRun) -> None:
    results = evaluated.report().results
    assert results is not None
    text = " ".join(Page((evaluated.path / "evaluation/report.html").read_text()).text.split())
    assert results.gate.sentence.removeprefix("Better than the base model: ") in text
    accuracy = next(m for m in results.metrics if m.metric == "accuracy")
    assert f"{100 * accuracy.tuned:.1f}%" in text
    for words in (
        "paired percentile bootstrap intervals", "TF-IDF + logistic regression, fitted on the same training rows",
        "Fixed by tuning",
        "12 steps in all: the model will hardly change.", "How is: sun day?", "acme/tiny-base", "learningRate",
        "Attempts",
    ):  # fmt: skip
        assert words in text


def test_failed_attempts_are_told(prepared: EvaluationRun) -> None:
    text = Page(page_html(data(prepared, ["a", "b", "c"], "ran out of memory"))).text
    assert "cuda-oom: ran out of memory" in text
    assert "resumed from step 20" in text


@pytest.mark.parametrize("count", [2, 3, 30, 77, 101])
def test_any_number_of_labels_can_be_shown(prepared: EvaluationRun, count: int) -> None:
    labels = [f"label number {n}" for n in range(max(count, 3))]
    html = page_html(data(prepared, labels, "x"))
    assert ("confusion matrix" in html) == (count <= 100)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(allow_nan=True, allow_infinity=True)), max_size=12))
def test_a_chart_takes_any_numbers(points: list[tuple[int, float]]) -> None:
    svg = str(line_chart([Series("loss", points, dots=True)], x="step", y="loss"))
    assert "nan" not in svg
    assert "inf" not in svg


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_cover_the_range_with_few_round_numbers(low: float, span: float) -> None:
    assume(span >= 1e-6 * abs(low))  # below that the steps are lost in a float's last digits
    found = ticks(low, low + span)
    step = found[1] - found[0] if len(found) > 1 else span
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= low + span - 1e-6 * step
    assert len(found) <= 8


def test_numbers_on_axes_are_short() -> None:
    assert [number(v) for v in (0, 2e-4, 0.25, 1200, -3.5)] == ["0", "2e-4", "0.25", "1,200", "−3.5"]


def test_a_curve_with_gaps_is_smoothed_over_what_is_there() -> None:
    nan = float("nan")
    assert [y for _, y in smoothed([(0, 1.0), (1, nan), (2, 3.0)])] == [1.0, 2.0, 3.0]


def test_curves_take_rows_of_every_kind() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "validation": {"loss": None}}, {"step": 2, "loss": None}]
    assert [curve["title"] for curve in curves(rows)] == ["Loss"]
    assert curves([]) == []


def test_a_matrix_names_labels_on_hover_where_there_is_no_room() -> None:
    labels = [f"intent {n}" for n in range(30)]
    svg = str(heatmap(np.eye(30, dtype=np.int64), labels))
    assert "intent 29 → intent 29: 1 (100%)" in svg
    assert 'class="tick"' not in svg


def test_a_matrix_of_few_labels_names_its_columns_as_its_rows() -> None:
    labels = ["Claim", "Not a Claim", "a label of many more words than can be shown"]
    svg = str(heatmap(np.eye(3, dtype=np.int64), labels))
    assert svg.count(">Claim</text>") == svg.count(">Not a Claim</text>") == 2
    assert svg.count("<title>a label of many more words than can be shown</title>a label of many more wo…</text>") == 2


def test_levels_of_equal_values_are_drawn() -> None:
    svg = str(level_chart([Level("a", Interval(value=1, low=1, high=1))], percent=True))
    assert "100.0%" in svg
