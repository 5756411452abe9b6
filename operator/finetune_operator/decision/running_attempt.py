"""The running attempt: how far it is, what it waits for, how it ended, and what follows from that.

How its end is recognised: `child_state` says where its object stands, `note_exit` notes when its pods began to end,
`result_of` waits for what they leave behind and names the root cause (root_cause.py). What follows from a failure is
the table of failure_policy.py, applied by `_record_failure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from finetune_api.base import Stage
from finetune_api.report import FailureClass
from finetune_api.status import AttemptRecord, JobStatus, Phase
from finetune_operator.decision import attempts, conditions, deadlines, progress, root_cause
from finetune_operator.decision.conditions import MISSING, RUNNING, JobCondition, State, starting, waiting
from finetune_operator.decision.failure_policy import (
    FailureAction,
    InfraFailure,
    backoff_seconds,
    condition_reason,
    policy_for,
    waits_for_user,
)
from finetune_operator.decision.model import Child, Observation, PodPhase, RunningAttempt
from finetune_operator.decision.next_attempt import smaller_footprint
from finetune_operator.decision.root_cause import Cause
from finetune_operator.decision.status_draft import StatusDraft

TRANSIENT_POLL_SECONDS = 15.0
"""How often a start is tried again that a quota or a webhook refused."""
POD_CREATION_SECONDS = 30.0
"""How long a child's controller may take to create its pods before the status says so."""
LONGEST_DOES_NOT_FIT = (
    "The longest document does not fit even alone: lower training.maxSequenceLength, shard over more GPUs, "
    "or use qlora."
)


class ChildState(Enum):
    """Where the object that runs an attempt stands."""

    SUCCEEDED = "succeeded"
    DELETED = "deleted"
    QUEUED = "queued"
    FAILED = "failed"
    ACTIVE = "active"


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended: no cause means success."""

    cause: Cause | None = None


def handle_running_attempt(draft: StatusDraft, running: RunningAttempt) -> JobCondition | None:
    """Bring the status up to date with the running attempt; None once its end is recorded and the job goes on."""
    deadlines.account_time(draft.status, running, draft.observation)
    if running.report is not None:
        progress.merge_report(draft.status, running.record, running.report)
    note_exit(running, draft.now)
    result = result_of(running, draft.observation) or _stopped_by_operator(draft)
    if result is None:
        return _describe(draft, running)
    if result.cause is None:
        return _record_success(draft, running)
    return _record_failure(draft, running.record, result.cause)


# How the end is recognised ------------------------------------------------------------------------------


def child_state(child: Child) -> ChildState:
    """Where a child stands, judged by its pods as well: one that fails is seen before its owner says so."""
    if child.succeeded:
        return ChildState.SUCCEEDED
    if child.deleting or not child.exists:
        return ChildState.DELETED
    if child.queued and not child.failed:
        return ChildState.QUEUED
    failed = child.failed or any(
        pod.phase is PodPhase.FAILED or pod.evicted or pod.node_lost or pod.out_of_service for pod in child.pods
    )
    return ChildState.FAILED if failed else ChildState.ACTIVE


def note_exit(running: RunningAttempt, now: datetime) -> None:
    """Note in the record when the attempt's pods were first seen to end; forget it if they have come back."""
    record = running.record
    if running.child is None:
        return
    match child_state(running.child):
        case ChildState.SUCCEEDED | ChildState.FAILED:
            record.exited = record.exited or now
        case ChildState.QUEUED:
            # A queue has suspended it and takes its pods away: they have not failed, and its clocks begin anew.
            record.exited, record.running_since = None, None
        case ChildState.ACTIVE:
            record.exited = None


def result_of(running: RunningAttempt, observation: Observation) -> AttemptResult | None:
    """How the attempt ended; None while it goes on or its evidence is still coming."""
    child, report = running.child, running.report
    if child is None:
        return None
    due = deadlines.evidence_deadline(running, observation)
    overdue = due is not None and observation.now >= due
    match child_state(child):
        case ChildState.SUCCEEDED:
            lacking = _missing_product(running)
            sentence = f"All pods of {running.record.stage} succeeded, but {lacking}: the report channel is broken."
            if not lacking:
                return AttemptResult()
            return AttemptResult(Cause(InfraFailure.NO_REPORT, sentence)) if overdue else None
        case ChildState.DELETED:
            return AttemptResult(root_cause.find(child, report))
        case ChildState.FAILED:
            ended = all(pod.ended or pod.abandoned for pod in child.pods)
            all_ended = ended and bool(child.pods) and len(child.pods) >= child.pods_expected
            return AttemptResult(root_cause.find(child, report)) if all_ended or overdue else None
        case ChildState.QUEUED:
            return None
        case ChildState.ACTIVE:
            return _timed_out(running, child, observation)


def _missing_product(running: RunningAttempt) -> str:
    """What the report of a finished stage lacks; empty when it names all that it must."""
    stage, report = running.record.stage, running.report
    if running.report_problem:
        return f"the final report cannot be used ({running.report_problem.rstrip('.')})"
    if report is None or not report.done:
        return "no final report arrived"
    if stage is Stage.TRAIN and report.export is None:
        return "the final report names no verified export"
    if stage is Stage.EVALUATE and report.results is None:
        return "the final report has no results"
    if stage is Stage.PUBLISH and report.published is None:
        return "the final report does not name what was published"
    return ""


def _timed_out(running: RunningAttempt, child: Child, observation: Observation) -> AttemptResult | None:
    now, report = observation.now, running.report
    startup = deadlines.startup_deadline(child, observation.spec)
    if startup is not None and now >= startup:
        started = sum(pod.started is not None for pod in child.pods)
        limit = observation.spec.timeouts.startup
        sentence = f"Only {started} of {child.pods_expected} pods started within {limit} of the first."
        reason = next((pod.waiting for pod in child.pods if pod.waiting), "")
        return AttemptResult(Cause(InfraFailure.PARTIAL_GANG, f"{sentence} {reason}".strip()))
    hang = deadlines.hang_deadline(running, observation)
    if hang is not None and now >= hang and report is not None:
        minutes = int((now - report.time).total_seconds()) // 60
        sentence = f"No report for {minutes} minutes although all pods are running: nothing makes progress in them."
        return AttemptResult(Cause(FailureClass.HANG, sentence))
    return None


def _stopped_by_operator(draft: StatusDraft) -> AttemptResult | None:
    """Ends that we bring about: the deadline, suspension."""
    if deadlines.used_up(draft.status, draft.spec):
        return AttemptResult(Cause(InfraFailure.DEADLINE, deadlines.used_up_message(draft.spec)))
    if draft.spec.suspend:
        return AttemptResult(Cause(InfraFailure.SUSPENDED, "spec.suspend is true."))
    return None


# What follows from it -----------------------------------------------------------------------------------


def _record_success(draft: StatusDraft, running: RunningAttempt) -> JobCondition | None:
    status, record, report = draft.status, running.record, running.report
    assert report is not None
    attempts.close(record, None, counted=False, now=draft.now)
    status.active_until = None
    progress.merge_products(status, report)
    conditions.mark_succeeded(status, record.stage, _success_message(status, record.stage), draft.now)
    gate = status.results.gate if record.stage is Stage.EVALUATE and status.results is not None else None
    if gate is not None and not gate.passed:
        return draft.fail("GateRefused", _with_model(status, gate.sentence))
    return None


def _success_message(status: JobStatus, stage: Stage) -> str:
    if stage is Stage.PREPARE:
        rows, count = sum(dataset.train for dataset in status.datasets), len(status.datasets)
        return f"{rows:,} training rows from {count} {'dataset' if count == 1 else 'datasets'}."
    if stage is Stage.TRAIN and status.export is not None:
        return f"Model of step {status.export.step:,} saved in {status.export.path} ({status.export.digest[:19]})."
    if stage is Stage.EVALUATE and status.results is not None:
        return f"{status.metric_text}: {status.results.gate.sentence}".strip(": ")
    if status.published is not None:
        return f"Published to {status.published.url or status.published.repo or status.published.path}."
    return "Succeeded."


def _record_failure(draft: StatusDraft, record: AttemptRecord, cause: Cause) -> JobCondition | None:
    """Record a failure and what follows from it by the policy."""
    status = draft.status
    policy = policy_for(cause.reason)
    attempts.close(record, cause, policy.counted, draft.now)
    status.active_until = None
    if policy.counted:
        failures = status.failures_counted.get(record.stage, 0) + 1
        status.failures_counted = status.failures_counted | {str(record.stage): failures}
    if waits_for_user(cause.reason, record.stage, draft.observation.environment.local):
        status.credentials_seen = draft.credentials
        return None
    reason, message = condition_reason(cause.reason), f"{record.stage} failed: {cause.sentence}"
    if policy.action is FailureAction.FAIL:
        return draft.fail(reason, _with_model(status, message))
    limit = draft.spec.retry.limit
    if policy.counted and status.failures_counted[record.stage] > limit:
        return draft.fail(reason, _with_model(status, f"{message} (retry.limit {limit} reached)"))
    if policy.action is FailureAction.SHRINK and smaller_footprint(draft, record) is None:
        return draft.fail(condition_reason(FailureClass.DOES_NOT_FIT), f"{cause.sentence} {LONGEST_DOES_NOT_FIT}")
    if cause.reason is not InfraFailure.SUSPENDED:
        _back_off(draft, record)
    return None


def _with_model(status: JobStatus, sentence: str) -> str:
    return sentence if status.export is None else f"{sentence} The model is in {status.export.path} on the run volume."


def _back_off(draft: StatusDraft, record: AttemptRecord) -> None:
    environment = draft.observation.environment
    seconds = backoff_seconds(
        f"{draft.observation.uid}/{record.stage}/{record.number}",
        attempts.failures_in_a_row(draft.status, record),
        environment.backoff_base_seconds,
        environment.backoff_cap_seconds,
    )
    draft.status.retry_at = deadlines.later(draft.now, seconds)


# What is said of it while it runs -----------------------------------------------------------------------


def _describe(draft: StatusDraft, running: RunningAttempt) -> JobCondition:
    """What the attempt does or waits for, and when to look again."""
    record, child, observation = running.record, running.child, draft.observation
    if child is None:
        return _describe_start(draft, record)
    draft.requeue_by(deadlines.evidence_deadline(running, observation))
    draft.requeue_by(deadlines.active_deadline(draft.status, draft.spec))
    reason, phase = RUNNING[record.stage]
    if child.queued:
        queue = draft.spec.pod_template.queue_name or "(Kueue)"
        return JobCondition(State.PROGRESSING, "Queued", f"Waiting for admission to queue {queue}.", Phase.QUEUED)
    draft.requeue_by(deadlines.startup_deadline(child, draft.spec))
    pods_waiting = _pods_waiting(draft, child)
    if pods_waiting:
        return waiting("WaitingForPods", pods_waiting)
    if record.exited is not None:
        message = "Pods have terminated; collecting their results."
        return JobCondition(State.PROGRESSING, "Ending", message, phase)
    if not child.all_run:
        return starting(record)
    if running.report_problem:
        message = f"Running {record.stage}. Its report is ignored, since it cannot be used: {running.report_problem}"
        return JobCondition(State.PROGRESSING, "ReportUnusable", message, phase)
    hang = deadlines.hang_deadline(running, observation)
    if hang is not None and running.report is None and draft.now >= hang:
        message = "The report channel is broken: all pods are running, but no report of this attempt has arrived."
        return JobCondition(State.PROGRESSING, "ReportChannelBroken", message, phase)
    draft.requeue_by(hang)
    return JobCondition(State.PROGRESSING, reason, f"Running {record.stage} (attempt {record.number}).", phase)


def _pods_waiting(draft: StatusDraft, child: Child) -> str:
    """Why not all pods run, in a sentence; empty if they do, or may soon."""
    created = len(child.pods)
    if created < child.pods_expected and child.created is not None and not child.failed and not child.succeeded:
        # What a quota refuses is reported to the controller that creates the pods, not to us.
        due = deadlines.later(child.created, POD_CREATION_SECONDS)
        if draft.now >= due:
            advice = "A quota or an admission rule may be refusing the rest: see `kubectl get events`."
            return f"{created} of {child.pods_expected} pods have been created. {advice}"
        draft.requeue_by(due)
    return "" if child.all_run else min((pod.waiting for pod in child.pods if pod.waiting), default="")


def _describe_start(draft: StatusDraft, record: AttemptRecord) -> JobCondition:
    earlier_job = attempts.blocked_by_earlier_job(draft.observation)
    if earlier_job:
        return waiting(MISSING["Leftover"], earlier_job)
    missing = next(iter(draft.observation.missing), None)
    if missing is None:
        return starting(record)
    draft.requeue_by(deadlines.later(draft.now, TRANSIENT_POLL_SECONDS))
    return waiting(MISSING[missing.kind], missing.sentence)


def take_last_checkpoint(draft: StatusDraft) -> None:
    """Take over a checkpoint reported after the end: an attempt that was stopped reports until its pods are gone."""
    stage = conditions.next_stage(draft.status, draft.spec)
    record = attempts.latest(draft.status, stage) if stage is not None else None
    report = draft.observation.report_of(record.stage, record.number) if record is not None else None
    if report is not None:
        draft.status.last_checkpoint = report.last_checkpoint or draft.status.last_checkpoint
