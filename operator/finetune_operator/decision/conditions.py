"""The conditions of a job: the table of the operator's contract, and one condition a stage.

`lastTransitionTime` changes only with `status`; reason, message and generation may change without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from finetune_api.base import STAGES, Stage
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import STAGE_CONDITION, Condition, ConditionType, JobStatus, Phase

NOT_REQUESTED = "NotRequested"
PENDING = "Pending"
MESSAGE_LIMIT = 1000


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
class Verdict:
    """Where the job stands: a row of the table, one word for programs, a sentence and a word for people."""

    state: State
    reason: str
    message: str
    phase: Phase


def put(status: JobStatus, kind: ConditionType, holds: bool, reason: str, message: str, now: datetime) -> None:
    """Set one condition in place, keeping its transition time if it holds (or not) as before."""
    value = "True" if holds else "False"
    before = status.condition(kind)
    condition = Condition(
        type=kind,
        status="True" if holds else "False",
        reason=reason,
        message=cut(message),
        last_transition_time=before.last_transition_time if before and before.status == value else now,
        observed_generation=status.observed_generation,
    )
    others = {c.type: c for c in status.conditions} | {kind: condition}
    status.conditions = [others[known] for known in ConditionType if known in others]


def write(status: JobStatus, verdict: Verdict, spec: FineTuneJobSpec, now: datetime) -> None:
    """Set every condition and the phase in place from a verdict; `status.observed_generation` is set already."""
    for kind in JOB_CONDITIONS:
        holds = kind in _TRUE[verdict.state]
        put(status, kind, holds, verdict.reason, verdict.message, now)
    status.stage = None if verdict.state is State.COMPLETE else next_stage(status, spec)
    for stage in STAGES:
        _write_stage(status, stage, verdict, spec, now)
    status.phase = verdict.phase


def _write_stage(status: JobStatus, stage: Stage, verdict: Verdict, spec: FineTuneJobSpec, now: datetime) -> None:
    kind = STAGE_CONDITION[stage]
    if finished(status, stage):
        condition = status.condition(kind)
        assert condition is not None
        put(status, kind, True, condition.reason, condition.message, now)
    elif stage is Stage.PUBLISH and spec.publish is None:
        put(status, kind, False, NOT_REQUESTED, "The model stays on the run volume: the job names no target.", now)
    elif stage is status.stage:
        put(status, kind, False, verdict.reason, verdict.message, now)
    else:
        put(status, kind, False, PENDING, f"Comes after {status.stage}." if status.stage else "", now)


def finish(status: JobStatus, stage: Stage, message: str, now: datetime) -> None:
    """Mark a stage as done for good."""
    put(status, STAGE_CONDITION[stage], True, "Succeeded", message, now)


def reopen(status: JobStatus, stage: Stage, now: datetime) -> None:
    """Mark a stage as to be done again."""
    put(status, STAGE_CONDITION[stage], False, PENDING, "To be done again.", now)


def finished(status: JobStatus, stage: Stage) -> bool:
    """Whether a stage has succeeded."""
    return status.is_true(STAGE_CONDITION[stage])


def next_stage(status: JobStatus, spec: FineTuneJobSpec) -> Stage | None:
    """The first stage that has not succeeded; Publish only if it was asked for."""
    for stage in STAGES:
        wanted = stage is not Stage.PUBLISH or spec.publish is not None
        if wanted and not finished(status, stage):
            return stage
    return None


def terminal(status: JobStatus) -> bool:
    """Whether the job has ended."""
    return status.is_true(ConditionType.COMPLETE) or status.is_true(ConditionType.FAILED)


def cut(sentence: str, limit: int = MESSAGE_LIMIT) -> str:
    """A sentence that fits: the status is bounded in size."""
    return sentence if len(sentence) <= limit else sentence[: limit - 1] + "…"
