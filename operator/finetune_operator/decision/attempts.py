"""The history of attempts, and which of them may still write."""

from __future__ import annotations

from datetime import datetime

from finetune_api.base import STAGES, Stage, duration_seconds
from finetune_api.report import Digests
from finetune_api.runconfig import Attempt
from finetune_api.status import AttemptRecord, JobStatus
from finetune_operator.decision.conditions import truncate
from finetune_operator.decision.failure_policy import Footprint, InfraFailure
from finetune_operator.decision.model import Observation
from finetune_operator.decision.root_cause import Cause

HISTORY = 50


def running(status: JobStatus) -> AttemptRecord | None:
    """The attempt that runs or is about to be started, if any; there is never more than one."""
    return next((record for record in reversed(status.attempts) if record.outcome == "running"), None)


def latest(status: JobStatus, stage: Stage) -> AttemptRecord | None:
    """The newest attempt of a stage."""
    return next((record for record in reversed(status.attempts) if record.stage is stage), None)


def find(status: JobStatus, stage: Stage, number: int) -> AttemptRecord | None:
    """The record of one attempt, unless the history has dropped it."""
    return next((r for r in status.attempts if r.stage is stage and r.number == number), None)


def add(status: JobStatus, stage: Stage, footprint: Footprint | None, now: datetime) -> AttemptRecord:
    """Add the stage's next attempt to the history; its child is created once this is persisted."""
    number = status.attempts_started.get(stage, 0) + 1
    record = AttemptRecord(stage=stage, number=number, started=now)
    if footprint is not None:
        record.micro_batch_tokens = footprint.micro_batch_tokens
        record.activation_checkpointing = footprint.activation_checkpointing or None
    status.attempts = [*status.attempts, record][-HISTORY:]
    status.attempts_started = status.attempts_started | {str(stage): number}
    status.retry_at = None
    return record


def close(record: AttemptRecord, cause: Cause | None, counted: bool, now: datetime) -> None:
    """Write the end of an attempt into its record; no cause means success."""
    record.ended = now
    if cause is None:
        record.outcome = "succeeded"
        return
    record.outcome = "suspended" if cause.reason is InfraFailure.SUSPENDED else "failed"
    record.reason, record.message = str(cause.reason), truncate(cause.sentence, 500)
    record.rank, record.counted = cause.rank, counted


def failures_in_a_row(status: JobStatus, record: AttemptRecord) -> int:
    """How many attempts of the record's stage, up to it, failed one after another with its reason since a retry."""
    newest_first = [r for r in reversed(status.attempts) if r.stage is record.stage and r.number <= record.number]
    alike = [r.outcome == "failed" and r.reason == record.reason and not r.forgiven for r in newest_first]
    return [*alike, False].index(False)


def blocked_by_earlier_attempt(observation: Observation, status: JobStatus) -> str:
    """What must be gone before a new attempt may write, in a sentence; empty when nothing is in the way.

    A child whose attempt has succeeded has only pods that have ended and stays for its logs.
    """
    older = blocked_by_earlier_job(observation)
    if older:
        return older
    for child in observation.children:
        record = find(status, child.stage, child.number)
        if record is not None and record.outcome == "succeeded":
            continue
        attempt = f"{child.stage} attempt {child.number}"
        pod = next((pod for pod in child.pods if not pod.out_of_service), None)
        if pod is not None:
            node = f" on node {pod.node}" if pod.node else ""
            advice = f" Its {child.foreign} belongs to another backend: delete it yourself." if child.foreign else ""
            return f"Waiting for pod {pod.name}{node} of {attempt} to terminate.{advice}"
        if child.exists:
            return f"Waiting for {attempt} to be deleted."
    return ""


def blocked_by_earlier_job(observation: Observation) -> str:
    """What is left of an earlier job of this name, in a sentence: it is never adopted, and nothing starts beside it."""
    older = next((child for child in observation.children if not child.ours), None)
    return f"Waiting for {older.stage} of an earlier job with this name to be deleted." if older is not None else ""


def _digests_for(status: JobStatus, stage: Stage) -> Digests:
    """What the stages before this one left."""
    names = ("prepared", "export", "results")[: STAGES.index(stage)]
    return Digests.model_validate({name: getattr(status.digests, name) for name in names})


def to_start(observation: Observation, record: AttemptRecord) -> Attempt:
    """What the pods of an attempt need to know; a pure function of the record, so that it may be created twice."""
    plan = observation.status.plan
    tokens = record.micro_batch_tokens
    if tokens is None and record.stage is Stage.TRAIN and plan is not None:
        tokens = plan.micro_batch_tokens
    return Attempt(
        uid=observation.uid,
        stage=record.stage,
        number=record.number,
        micro_batch_tokens=tokens,
        activation_checkpointing=record.activation_checkpointing,
        grace_seconds=observation.environment.grace_seconds,
        startup_seconds=duration_seconds(observation.spec.timeouts.startup),
        hang_seconds=duration_seconds(observation.spec.timeouts.hang),
        digests=_digests_for(observation.status, record.stage),
        report_to="file" if observation.environment.local else "configmap",
    )
