"""What a report adds to the status, and when a status is written."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from finetune_api.base import Stage
from finetune_api.report import Choice, MetricResult, Progress, Report, Results
from finetune_api.status import AttemptRecord, JobStatus, Origin
from finetune_operator.decision.conditions import truncate
from finetune_operator.decision.model import Decision, Observation

WRITE_INTERVAL_SECONDS = 60
WORDING_INTERVAL_SECONDS = 2
"""How long after the last write a status waits of which only the wording is new (starting, running, ending). Writes
are the costliest requests of the operator, and a quick stage passes through several such states at once."""
WARNINGS_KEPT = 30
CHOICES_KEPT = 100
PROGRESS_FIELDS = frozenset(
    {
        "progress",
        "progressText",
        "etaText",
        "activity",
        "lastCheckpoint",
        "metricText",
        "choices",
        "warnings",
        "wandbUrl",
        "activeSeconds",
        "activeUntil",
        "gpuHours",
        "price",
    }
)
"""Fields of the status that change all the time: no decision depends on them; written at most once per minute."""


PRODUCTS: dict[Stage, tuple[tuple[str, ...], str]] = {
    Stage.PREPARE: (("datasets", "plan"), "prepared"),
    Stage.TRAIN: (("export",), "export"),
    Stage.EVALUATE: (("results",), "results"),
    Stage.PUBLISH: (("published",), ""),
}
"""Fields that each stage alone fills, and the digest that it reports: what it says of another's product is ignored."""


def merge_report(status: JobStatus, record: AttemptRecord, report: Report) -> None:
    """Take over the progress that a running (or just ended) attempt reports."""
    status.progress = report.progress
    status.progress_text = progress_text(report.progress)
    status.eta_text = eta_text(None if report.done else report.progress.eta_seconds)
    status.activity = truncate(report.activity, 200)
    status.last_checkpoint = report.last_checkpoint or status.last_checkpoint
    status.choices = _bounded(status.choices | report.choices)
    status.warnings = merged_warnings(status.warnings, report.warnings)
    status.wandb_url = report.wandb_url or status.wandb_url
    if report.progress.validation is not None:
        validation = report.progress.validation
        status.metric_text = f"{validation.metric} {validation.value:.3f}"
    if report.resumed_from_step is not None:
        record.resumed_from_step = report.resumed_from_step


def _bounded(choices: dict[str, Choice]) -> dict[str, Choice]:
    """The newest choices, cut to a length: they add up over reports, and the status has to stay storable."""
    newest = list(choices.items())[-CHOICES_KEPT:]
    return {
        truncate(name, 200): Choice(value=truncate(choice.value, 500), why=truncate(choice.why, 500))
        for name, choice in newest
    }


def merge_products(status: JobStatus, report: Report) -> None:
    """Take over for good what a stage that succeeded has produced."""
    products, digest = PRODUCTS[report.stage]
    for name in products:
        setattr(status, name, getattr(report, name) or getattr(status, name))
    if digest:
        status.digests = status.digests.model_copy(update={digest: getattr(report.digests, digest)})
    if report.stage is Stage.EVALUATE and report.results is not None:
        status.metric_text = metric_text(report.results)
    status.origin = _with_origin(status.origin, report.origin)
    if report.stage is not Stage.TRAIN:
        status.activity = ""


_ON_THE_WIRE = {key: field.alias or name for name, field in Origin.model_fields.items() for key in (name, field.alias)}


def _with_origin(origin: Origin, reported: dict[str, object]) -> Origin:
    """What a report says of the origin, added field by field: what cannot be read is left out and stops nothing."""
    for name, value in reported.items():
        if name in _ON_THE_WIRE:
            with contextlib.suppress(ValidationError):
                origin = Origin.model_validate(origin.model_dump(by_alias=True) | {_ON_THE_WIRE[name]: value})
    return origin


def merged_warnings(before: list[str], new: list[str]) -> list[str]:
    """Both without repetition, the newest kept."""
    return list(dict.fromkeys([*before, *(truncate(sentence, 500) for sentence in new)]))[-WARNINGS_KEPT:]


def progress_text(progress: Progress) -> str:
    """`120/450 (27%)` for a column; steps alone while the total is unknown."""
    if progress.total <= 0:
        return str(progress.step) if progress.step else ""
    return f"{progress.step}/{progress.total} ({100 * progress.step // progress.total}%)"


def eta_text(seconds: int | None) -> str:
    """`1h20m`, `12m`, `40s` for a column; empty while unknown."""
    if seconds is None:
        return ""
    minutes, hours = seconds // 60, seconds // 3600
    if hours >= 24:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}h{minutes % 60}m" if hours else f"{minutes}m" if minutes else f"{max(0, seconds)}s"


def metric_text(results: Results) -> str:
    """`0.415 → 0.623`: the metric that the gate reads, the mean over datasets where there are several."""
    headline = _headline(results.metrics)
    if headline is None:
        return ""
    tuned = f"{headline.tuned:.3f}"
    return tuned if headline.base is None else f"{headline.base:.3f} → {tuned}"


def _headline(metrics: list[MetricResult]) -> MetricResult | None:
    primary = [metric for metric in metrics if metric.primary]
    mean = [metric for metric in primary or metrics if metric.dataset == "macro"]
    return next(iter(mean or primary or metrics), None)


def conclusions(wire: dict[str, Any]) -> dict[str, Any]:
    """A status on the wire without its progress: two equal ones hold the same conclusions."""
    return {name: value for name, value in wire.items() if name not in PROGRESS_FIELDS}


def _without_wording(conclusions: dict[str, Any]) -> dict[str, object]:
    """What programs and the next decision read: what is concluded, not how it is worded."""
    worded, times = ("phase", "conditions", "attempts"), ("runningSince", "exited")
    conditions = [(c["type"], c["status"], c["observedGeneration"]) for c in conclusions.get("conditions", ())]
    attempts = [{n: v for n, v in record.items() if n not in times} for record in conclusions.get("attempts", ())]
    rest = {name: value for name, value in conclusions.items() if name not in worded}
    return rest | {"conditions": conditions, "attempts": attempts}


def should_write_status(observation: Observation, decision: Decision, last_write: datetime | None) -> bool:
    """Whether to write the decision's status over the persisted one, which this process last wrote at `last_write`.

    Equal: no. Other conclusions: at once. Other wording: two seconds after the last write. Progress alone: one minute
    after it. A fresh process (`last_write` is None) waits that minute as well, from `activeUntil`, so that a restart
    with a thousand jobs does not write a thousand statuses at once.
    """
    if observation.wire == decision.wire:
        return False
    before, after = conclusions(observation.wire), conclusions(decision.wire)
    if before != after:
        age = None if last_write is None else (observation.now - last_write).total_seconds()
        return age is None or age >= WORDING_INTERVAL_SECONDS or _without_wording(before) != _without_wording(after)
    last = last_write or observation.status.active_until
    return last is None or observation.now - last >= timedelta(seconds=WRITE_INTERVAL_SECONDS)
