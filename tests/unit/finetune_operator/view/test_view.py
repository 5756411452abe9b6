"""The live view, the table of results and the plain lines, as a reader sees them at 80 columns."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import JobStatus
from finetune_operator.view.live import render
from finetune_operator.view.outputs import JsonOutput, PlainOutput
from finetune_operator.view.scene import History, Scene
from finetune_operator.view.words import BARS, count, duration, sparkline

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
SPEC = FineTuneJobSpec.model_validate(
    {
        "model": {"repo": "meta-llama/Meta-Llama-3-8B-Instruct"},
        "datasets": [{"name": "claims", "path": "claims.csv"}],
        "tuning": {"method": "qlora"},
        "publish": {"repo": "acme/support-llama"},
    }
)


def ago(minutes: float) -> str:
    return (NOW - timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, reason: str = "Succeeded", message: str = "") -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": ago(5)}


def attempt(stage: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"stage": stage, "number": number, "started": ago(3), "outcome": "running"} | fields


def scene(status: dict[str, Any], **fields: Any) -> Scene:
    return Scene("support-llama", SPEC, JobStatus.parse(status), NOW, **fields)


TRAINING: dict[str, Any] = {
    "stage": "train",
    "conditions": [condition("Prepared"), condition("Reconciling", "Training")],
    "attempts": [
        attempt("prepare", ended=ago(2), outcome="succeeded"),
        attempt(
            "train", outcome="failed", ended=ago(1), reason="cuda-oom", message="GPU memory ran out.", counted=True
        ),
        attempt("train", 2, resumedFromStep=40),
    ],
    "progress": {
        "step": 120,
        "total": 450,
        "tokensPerSecond": 12473,
        "etaSeconds": 2710,
        "loss": 0.5,
        "learningRate": 2e-4,
    },
    "activity": "training",
    "lastCheckpoint": {"step": 110, "path": "checkpoints/step-00000110", "time": ago(2)},
    "choices": {"precision": {"value": "bf16", "why": "the GPU computes it fast"}},
    "warnings": ["12 steps in all."],
}


def metric(dataset: str, base: float, tuned: float, low: float, high: float, **baselines: float) -> dict[str, Any]:
    interval = {"value": round(tuned - base, 3), "low": low, "high": high}
    result = {"dataset": dataset, "metric": "accuracy", "rows": 400, "primary": True, "base": base, "tuned": tuned}
    return result | {"difference": interval, "baselines": {name.replace("_", "-"): v for name, v in baselines.items()}}


def complete(*metrics: dict[str, Any]) -> dict[str, Any]:
    gate = {"passed": True, "reason": "improved", "sentence": "Better than the base model."}
    kinds = ("Complete", "Prepared", "Trained", "Evaluated", "Published")
    return {
        "conditions": [condition(kind) for kind in kinds],
        "export": {"path": "export", "digest": "sha256:0", "format": "adapter", "sizeBytes": 1, "step": 9},
        "results": {"split": "test", "metrics": list(metrics), "gate": gate, "exportDigest": "sha256:0"},
        "published": {"url": "https://huggingface.co/acme/support-llama", "digest": "sha256:0"},
    }


def shown(of: Scene, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render(of))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return str(text)


def test_a_running_training_shows_where_it_is() -> None:
    history = History()
    history.add_rows(json.dumps({"step": s, "loss": 3.0 / s}) for s in range(1, 121))
    history.add_rows([json.dumps({"step": 100, "validation": {"loss": 0.7, "accuracy": 0.61}}), "half a ro"])
    text = shown(scene(TRAINING, history=history, notes=("1 GPU of 4 left idle.",)))
    for part in (
        "✓ prepare",
        "● train",
        "○ evaluate",
        "○ publish",
        "120/450 steps  26%  45m 10s to go",
        "12,473 tokens/s",
        "learning rate 2e-04",
        "accuracy 0.610  (step 100)",
        "step 110, 2m 00s ago",
        "train attempt 1: GPU memory ran out. (cuda-oom)",
        "2, resumed from step 40",
        "precision bf16",
        "12 steps in all.",
        "1 GPU of 4 left idle.",
        "█",
    ):
        assert part in text


def test_the_results_show_base_tuned_interval_and_baselines() -> None:
    text = shown(
        scene(complete(metric("claims", 0.4, 0.6, 0.14, 0.27, majority=0.41, tfidf_logreg=0.66, few_shot=0.5)))
    )
    for part in (
        "0.400",
        "0.600",
        "+0.200",
        "[+0.140, +0.270]",
        "0.410",
        "0.660",
        "majority",
        "TF-IDF",
        "few-shot 0.500",
    ):
        assert part in text
    assert "not significant" not in text
    assert "https://huggingface.co/acme/support-llama" in text


@pytest.mark.parametrize(
    ("low", "high", "said"), [(-0.01, 0.05, True), (0.0, 0.05, True), (0.01, 0.05, False), (-0.2, -0.1, False)]
)
def test_a_difference_whose_interval_holds_zero_is_called_not_significant(low: float, high: float, said: bool) -> None:
    assert ("not significant" in shown(scene(complete(metric("claims", 0.4, 0.42, low, high))))) is said


def test_a_job_that_waits_says_for_what_and_how_long() -> None:
    message = "Retrying train after a backoff. Last failure: Killed."
    status = {"stage": "train", "retryAt": ago(-1), "conditions": [condition("Reconciling", "BackingOff", message)]}
    text = shown(scene(status))
    assert message in text
    assert "(in 1m 00s)" in text
    assert "↻ train" in text


def test_a_failed_job_says_why_once() -> None:
    message = "prepare failed: The model is gated."
    status = {
        "stage": "prepare",
        "conditions": [condition("Failed", "NoAccess", message)],
        "attempts": [
            attempt("prepare", outcome="failed", ended=ago(1), reason="no-access", message="The model is gated.")
        ],
    }
    text = shown(scene(status, run="/data/runs/x"))
    assert text.count("The model is gated.") == 1
    assert "✗ prepare" in text
    assert "/data/runs/x" in text


def test_a_step_that_was_done_again_after_a_resume_counts_once() -> None:
    history = History()
    history.add_rows(json.dumps({"step": step, "loss": loss}) for step, loss in ((1, 3.0), (2, 2.0), (2, 1.5)))
    assert history.loss == {1: 3.0, 2: 1.5}


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), iter(NOW + timedelta(seconds=second) for second in range(10_000))
    output = PlainOutput(stream, clock=lambda: next(clock))
    for step in range(100):
        output.scene(scene(TRAINING | {"progress": {"step": step + 1, "total": 100, "loss": 1.0}}))
    lines = stream.getvalue().splitlines()
    assert "train starts, attempt 2" in lines[0]
    assert sum("12 steps in all." in line for line in lines) == 1
    assert 2 <= sum("steps (" in line for line in lines) <= 20


def test_json_lines_are_written_only_when_something_changed() -> None:
    stream = io.StringIO()
    output = JsonOutput(stream, dict)
    for _ in range(5):
        output.scene(scene(TRAINING))
    assert len(stream.getvalue().splitlines()) == 1


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=200), st.integers(2, 60))
@example([1.7976931348623157e308, -1e308], 2)
@example([0.0, 5e-324], 2)
def test_a_sparkline_never_fails_and_fits(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) <= width
    assert set(line) <= set(BARS)


def test_a_falling_curve_falls() -> None:
    line = sparkline([2.0**-step for step in range(64)], 8)
    assert line == "".join(reversed(BARS))


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (97200, "1d 3h")]
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(12473, "12,473"), (41_943_040, "42 M"), (8_030_261_248, "8.0 B")])
def test_counts_read_well(number: float, text: str) -> None:
    assert count(number) == text


def test_a_status_cannot_steer_the_terminal() -> None:
    evil = "x\x1b]0;PWNED\x07\x1b[2J\x9b31m\r"
    status = TRAINING | {"warnings": [evil], "activity": evil, "choices": {evil: {"value": evil, "why": evil}}}
    screen, lines = io.StringIO(), io.StringIO()
    Console(file=screen, width=80, force_terminal=True, color_system=None).print(render(scene(status)))
    plain = PlainOutput(lines)
    plain.scene(scene(status | {"stage": "prepare"}))
    plain.event("Normal", "Some", evil)
    for shown in (screen.getvalue(), lines.getvalue()):
        assert "PWNED" in shown
        assert not set("\x1b\x07\x9b\r") & set(shown)
