"""The conditions of a job: the table of the operator's contract, and one condition per stage.

`lastTransitionTime` changes only with `status`; reason, message and generation may change without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Literal

from finetune_api.base import STAGES, Stage
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import STAGE_CONDITION, AttemptRecord, Condition, ConditionType, JobStatus, Phase

PENDING = "Pending"
MESSAGE_LIMIT = 1000
RUNNING: dict[Stage, tuple[str, Phase]] = {
    Stage.PREPARE: ("Preparing", Phase.PREPARING),
    Stage.TRAIN: ("Training", Phase.TRAINING),
    Stage.EVALUATE: ("Evaluating", Phase.EVALUATING),
    Stage.PUBLISH: ("Publishing", Phase.PUBLISHING),
}
"""Reason and phase while a stage runs."""
MISSING = {
    "Secret": "WaitingForSecret",
    "PersistentVolumeClaim": "WaitingForClaim",
    "Webhook": "WaitingForWebhook",
    "Quota": "WaitingForQuota",
    "Leftover": "WaitingForOlderJob",
    "Refused": "WaitingForApiServer",
}
"""Reason while something is missing, by its kind."""


class State(Enum):
    """The four rows of the table."""

    PROGRESSING = "progressing"
    SUSPENDED = "suspended"
    COMPLETE = "complete"
    FAILED = "failed"


_TRUE: dict[State, frozenset[ConditionType]] = {
    State.PROGRESSING: frozenset({ConditionType.RECONCILING}),
    State.SUSPENDED: frozenset({ConditionType.SUSPENDED}),
    State.COMPLETE: frozenset({ConditionType.READY, ConditionType.COMPLETE}),
    State.FAILED: frozenset({ConditionType.STALLED, ConditionType.FAILED}),
}
JOB_CONDITIONS: tuple[ConditionType, ...] = tuple(
    kind for kind in ConditionType if kind not in STAGE_CONDITION.values()
)


@dataclass(frozen=True)
class JobCondition:
    """Where the job stands: a row of the table, a word for programs, a sentence and a word for people."""

    state: State
    reason: str
    message: str
    phase: Phase


def waiting(reason: str, message: str) -> JobCondition:
    """The job waits and goes on by itself."""
    return JobCondition(State.PROGRESSING, reason, message, Phase.WAITING)


def starting(record: AttemptRecord) -> JobCondition:
    """An attempt is being started."""
    _, phase = RUNNING[record.stage]
    return JobCondition(State.PROGRESSING, "Starting", f"Starting {record.stage} (attempt {record.number}).", phase)


def set_condition(
    status: JobStatus, kind: ConditionType, holds: bool, reason: str, message: str, now: datetime
) -> None:
    """Set one condition, keeping its transition time if it holds (or not) as before."""
    value: Literal["True", "False"] = "True" if holds else "False"
    before = status.condition(kind)
    condition = Condition(
        type=kind,
        status=value,
        reason=reason,
        message=truncate(message),
        last_transition_time=before.last_transition_time if before and before.status == value else now,
        observed_generation=status.observed_generation,
    )
    others = {c.type: c for c in status.conditions} | {kind: condition}
    status.conditions = [others[known] for known in ConditionType if known in others]


def set_conditions(status: JobStatus, job: JobCondition, spec: FineTuneJobSpec, now: datetime) -> None:
    """Set every condition and the phase from where the job stands; `status.observed_generation` is set already."""
    for kind in JOB_CONDITIONS:
        set_condition(status, kind, kind in _TRUE[job.state], job.reason, job.message, now)
    status.stage = None if job.state is State.COMPLETE else next_stage(status, spec)
    for stage in STAGES:
        _set_stage(status, stage, job, spec, now)
    status.phase = job.phase


def _set_stage(status: JobStatus, stage: Stage, job: JobCondition, spec: FineTuneJobSpec, now: datetime) -> None:
    kind = STAGE_CONDITION[stage]
    before = status.condition(kind)
    if before is not None and before.status == "True":
        set_condition(status, kind, True, before.reason, before.message, now)
        return
    reason, message = PENDING, f"Waiting for {status.stage}." if status.stage else ""
    if stage is Stage.PUBLISH and spec.publish is None:
        reason, message = "NotRequested", "spec.publish is not set: the model stays on the run volume."
    elif stage is status.stage:
        reason, message = job.reason, job.message
    set_condition(status, kind, False, reason, message, now)


def mark_succeeded(status: JobStatus, stage: Stage, message: str, now: datetime) -> None:
    """Mark a stage as finished for good."""
    set_condition(status, STAGE_CONDITION[stage], True, "Succeeded", message, now)


def next_stage(status: JobStatus, spec: FineTuneJobSpec) -> Stage | None:
    """The first stage that has not succeeded; Publish only if it was asked for."""
    for stage in STAGES:
        requested = stage is not Stage.PUBLISH or spec.publish is not None
        if requested and not status.is_true(STAGE_CONDITION[stage]):
            return stage
    return None


def terminal(status: JobStatus) -> bool:
    """Whether the job has ended."""
    return status.is_true(ConditionType.COMPLETE) or status.is_true(ConditionType.FAILED)


def truncate(sentence: str, limit: int = MESSAGE_LIMIT) -> str:
    """A sentence that fits: the status is bounded in size."""
    return sentence if len(sentence) <= limit else sentence[: limit - 1] + "…"
