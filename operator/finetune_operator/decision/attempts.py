"""The history of attempts, who may still write, and how a running attempt's end is recognised."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.base import Stage, duration_seconds
from finetune_api.report import FailureClass, Report, attempt_id
from finetune_api.runconfig import Attempt
from finetune_api.status import AttemptRecord, JobStatus
from finetune_operator.decision import deadlines, root_cause
from finetune_operator.decision.conditions import cut
from finetune_operator.decision.failure_policy import Disturbance, Footprint
from finetune_operator.decision.model import Child, Observation, PodPhase
from finetune_operator.decision.root_cause import Cause

HISTORY = 50


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: no cause is success."""

    cause: Cause | None = None


def live(status: JobStatus) -> AttemptRecord | None:
    """The attempt that runs or is to be started, if any; there is never more than one."""
    return next((record for record in reversed(status.attempts) if record.outcome == "running"), None)


def latest(status: JobStatus, stage: Stage) -> AttemptRecord | None:
    """The newest attempt of a stage."""
    return next((record for record in reversed(status.attempts) if record.stage is stage), None)


def find(status: JobStatus, stage: Stage, number: int) -> AttemptRecord | None:
    """The record of one attempt, unless the history has dropped it."""
    return next((r for r in status.attempts if r.stage is stage and r.number == number), None)


def open_next(status: JobStatus, stage: Stage, footprint: Footprint | None, now: datetime) -> AttemptRecord:
    """Enter the stage's next attempt into the history in place; its child is made once this is persisted."""
    number = status.attempts_started.get(stage, 0) + 1
    record = AttemptRecord(stage=stage, number=number, started=now)
    if footprint is not None:
        record.micro_batch_tokens = footprint.micro_batch_tokens
        record.activation_checkpointing = footprint.activation_checkpointing or None
    status.attempts = [*status.attempts, record][-HISTORY:]
    status.attempts_started = status.attempts_started | {str(stage): number}
    status.retry_at = None
    return record


def close(record: AttemptRecord, ending: Ending, counted: bool, now: datetime) -> None:
    """Write an attempt's end into its record in place."""
    record.ended = now
    cause = ending.cause
    if cause is None:
        record.outcome = "succeeded"
        return
    record.outcome = "suspended" if cause.reason is Disturbance.SUSPENDED else "failed"
    record.reason, record.message = str(cause.reason), cut(cause.sentence, 500)
    record.rank, record.counted = cause.rank, counted


def failures_in_a_row(status: JobStatus, record: AttemptRecord) -> int:
    """How many attempts of the record's stage, up to it, failed one after another with its reason since a retry."""
    count = 0
    for earlier in reversed([r for r in status.attempts if r.stage is record.stage and r.number <= record.number]):
        if earlier.outcome != "failed" or earlier.reason != record.reason or earlier.forgiven:
            break
        count += 1
    return count


def child_of(seen: Observation, record: AttemptRecord) -> Child | None:
    """Our child that carries an attempt, if it (or a pod of it) is still there."""
    return next((c for c in seen.children if c.ours and c.stage is record.stage and c.number == record.number), None)


def report_of(seen: Observation, stage: Stage, number: int) -> Report | None:
    """The report of one attempt; reports of any other are not looked at."""
    name = attempt_id(seen.uid, stage, number)
    return next((report for report in seen.reports if report.attempt == name), None)


def blocking(seen: Observation, status: JobStatus) -> str:
    """What must be gone before a new attempt may write, in a sentence; empty when nothing is in the way.

    A child whose attempt has succeeded has only pods that have ended and stays for its logs.
    """
    older = of_older_job(seen)
    if older:
        return older
    for child in seen.children:
        if succeeded(status, child):
            continue
        held = next((pod for pod in child.pods if not pod.out_of_service), None)
        if held is not None:
            where = f" on node {held.node}" if held.node else ""
            whose = f" Its {child.foreign} is not of this operator's backend: delete it." if child.foreign else ""
            return f"Waits until pod {held.name}{where} of {child.stage} attempt {child.number} is gone.{whose}"
        if child.exists:
            return f"Waits until {child.stage} attempt {child.number} is deleted."
    return ""


def waits_for_the_old(seen: Observation, status: JobStatus) -> bool:
    """Whether something of an earlier attempt, or of an earlier job of this name, has to go before anything starts."""
    return bool(blocking(seen, status) if live(status) is None else of_older_job(seen))


def of_older_job(seen: Observation) -> str:
    """What is left of an older job of this name, in a sentence: it is never adopted, and nothing starts beside it."""
    older = next((child for child in seen.children if not child.ours), None)
    return f"Waits until the {older.stage} of an earlier job of this name is gone." if older is not None else ""


def succeeded(status: JobStatus, child: Child) -> bool:
    """Whether a child carried the attempt that made its stage succeed."""
    record = find(status, child.stage, child.number)
    return record is not None and record.outcome == "succeeded"


def conclude(record: AttemptRecord, child: Child | None, report: Report | None, seen: Observation) -> Ending | None:
    """How a running attempt ended, or None while it goes on or its evidence is still coming.

    Notes in place when its end was first seen.
    """
    if child is None:
        return None
    if child.succeeded:
        return _conclude_success(record, child, report, seen)
    if child.deleting or not child.exists:
        return Ending(root_cause.find(child, report))
    if child.queued and not child.failed:
        # Another has suspended it and takes its pods away: they have not failed, and its clocks begin anew.
        record.exited, record.running_since = None, None
        return None
    broken = child.failed or any(
        pod.phase is PodPhase.FAILED or pod.evicted or pod.node_lost or pod.out_of_service for pod in child.pods
    )
    if broken:
        return _conclude_failure(record, child, report, seen)
    record.exited = None
    return _too_late(record, child, report, seen)


def _conclude_success(record: AttemptRecord, child: Child, report: Report | None, seen: Observation) -> Ending | None:
    if report is not None and report.done and not missing_product(record.stage, report):
        return Ending()
    record.exited = record.exited or seen.now
    if not _evidence_is_in(record, child, report, seen):
        return None
    lacking = missing_product(record.stage, report) if report and report.done else "no report that it is done"
    sentence = f"The pods of {record.stage} succeeded, but {lacking} arrived: the report channel is broken."
    return Ending(Cause(Disturbance.NO_REPORT, sentence))


def missing_product(stage: Stage, report: Report) -> str:
    """What the report of a finished stage must name and does not; empty when it names it."""
    if stage is Stage.TRAIN and report.export is None:
        return "no verified export"
    if stage is Stage.EVALUATE and report.results is None:
        return "no results"
    if stage is Stage.PUBLISH and report.published is None:
        return "no word of what was published"
    return ""


def _conclude_failure(record: AttemptRecord, child: Child, report: Report | None, seen: Observation) -> Ending | None:
    record.exited = record.exited or seen.now
    settled = bool(child.pods) and all(deadlines.ended(pod) or deadlines.given_up(pod) for pod in child.pods)
    whole = len(child.pods) >= child.pods_expected
    if (settled and whole) or _evidence_is_in(record, child, report, seen):
        return Ending(root_cause.find(child, report))
    return None


def evidence_due(record: AttemptRecord, child: Child, report: Report | None, seen: Observation) -> datetime | None:
    """When an attempt that has begun to end is concluded with what is known by then."""
    named = root_cause.named_at(child, report)
    if named is None and any(deadlines.given_up(pod) for pod in child.pods):
        named = record.exited
    return deadlines.evidence_deadline(record, child, named, seen.environment, seen.now)


def _evidence_is_in(record: AttemptRecord, child: Child, report: Report | None, seen: Observation) -> bool:
    due = evidence_due(record, child, report, seen)
    return due is not None and seen.now >= due


def _too_late(record: AttemptRecord, child: Child, report: Report | None, seen: Observation) -> Ending | None:
    startup = deadlines.startup_deadline(child, seen.spec)
    if startup is not None and seen.now >= startup:
        up = sum(pod.started is not None for pod in child.pods)
        sentence = f"{up} of {child.pods_expected} pods ran within {seen.spec.timeouts.startup} of the first."
        waiting = next((pod.waiting for pod in child.pods if pod.waiting), "")
        return Ending(Cause(Disturbance.PARTIAL_GANG, f"{sentence} {waiting}".strip()))
    hang = deadlines.hang_deadline(record, report, seen.spec, seen.environment)
    if hang is not None and seen.now >= hang and report is not None:
        silence = int((seen.now - report.time).total_seconds()) // 60
        sentence = f"No report for {silence} minutes although all pods run: the ranks' own watchdogs hang as well."
        return Ending(Cause(FailureClass.HANG, sentence))
    return None


def to_start(seen: Observation, record: AttemptRecord) -> Attempt:
    """What the pods of an attempt are told; a pure function of the record, so that it may be made twice."""
    plan = seen.status.plan
    tokens = record.micro_batch_tokens
    if tokens is None and record.stage is Stage.TRAIN and plan is not None:
        tokens = plan.micro_batch_tokens
    return Attempt(
        uid=seen.uid,
        stage=record.stage,
        number=record.number,
        micro_batch_tokens=tokens,
        activation_checkpointing=record.activation_checkpointing,
        grace_seconds=seen.environment.grace_seconds,
        startup_seconds=duration_seconds(seen.spec.timeouts.startup),
        hang_seconds=duration_seconds(seen.spec.timeouts.hang),
        report_to="file" if seen.environment.local else "configmap",
    )
