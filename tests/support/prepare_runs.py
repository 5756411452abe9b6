"""Prepare in this process: a job's directory with a tiny model and data, and the context that a pod would have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_api.base import Stage
from finetune_api.runconfig import Attempt, JobRef, Paths, RunConfig, resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import RunContext
from finetune_trainer.prepare import fetch, stage
from finetune_trainer.reporter import Reporter


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """Write rows as JSON lines; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def labelled(count: int, labels: Sequence[str] = ("bad", "good")) -> list[dict[str, str]]:
    """Rows of a classification, all different, labels in turn."""
    return [
        {"text": f"the weather of day {i} was number {i * 7919 % 1000}", "label": labels[i % len(labels)]}
        for i in range(count)
    ]


def prepare_context(
    work: Path, spec: Mapping[str, Any], *, number: int = 1, token: str | None = None, cache: Path | None = None
) -> RunContext:
    """The context of Prepare for a job whose file lies in `work`.

    `spec` is completed with a LoRA on `tiny`, and a gate that needs no rows.
    """
    whole = {"model": {"path": "tiny"}, "tuning": {"method": "lora"}} | dict(spec)
    whole["evaluation"] = {"gate": {"mustImprove": False}} | dict(whole.get("evaluation", {}))
    run = work / "run"
    config = RunConfig(
        job=JobRef(namespace="default", name="job", uid="uid-1"),
        spec=resolve(FineTuneJobSpec.model_validate(whole)),
        paths=Paths(run=str(run), cache=str(cache or work / "cache"), source=str(work)),
    )
    tokens = None
    if token is not None:
        tokens = work / "tokens"
        tokens.mkdir(exist_ok=True)
        (tokens / "hub").write_text(token)
    attempt = Attempt(uid="uid-1", stage=Stage.PREPARE, number=number)
    return RunContext(config, attempt, Reporter(attempt, run / "reports", enabled=True), tokens=tokens)


def prepare(context: RunContext) -> None:
    """The programs of Prepare, one after the other; only the first has the token, and the Hub."""
    fetch.run(context)
    stage.run(replace(context, tokens=None))
