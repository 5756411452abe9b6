"""The running attempt: how far it is, what it waits for, how it ended, and what follows from that."""

from __future__ import annotations

from finetune_api.base import Stage
from finetune_api.report import FailureClass
from finetune_api.status import AttemptRecord, JobStatus, Phase
from finetune_operator.decision import attempts, conditions, deadlines, progress
from finetune_operator.decision.attempts import Ending
from finetune_operator.decision.conditions import State, Verdict
from finetune_operator.decision.draft import RUNNING, WAITING_FOR, Draft, credentials, deadline_sentence, fail, starting
from finetune_operator.decision.entering import shrunk
from finetune_operator.decision.failure_policy import (
    Disturbance,
    Then,
    backoff_seconds,
    camel,
    policy_for,
    waits_for_user,
)
from finetune_operator.decision.model import Child
from finetune_operator.decision.root_cause import Cause

TRANSIENT_POLL_SECONDS = 15.0
"""How often a start is tried again that quota or a webhook refused."""
POD_CREATION_SECONDS = 30.0
"""How long a child's controller may take to make its pods before that is worth a sentence."""


def follow(draft: Draft, record: AttemptRecord) -> Verdict | None:
    """Follow the running attempt; None once its end is recorded and the job goes on."""
    seen, status = draft.seen, draft.status
    child = attempts.child_of(seen, record)
    report = attempts.report_of(seen, record.stage, record.number)
    deadlines.meter(status, record, child, seen.spec, seen.environment, seen.now)
    if report is not None:
        progress.absorb(status, record, report)
    ending = attempts.conclude(record, child, report, seen)
    if ending is None:
        ending = _stopped(draft)
    if ending is None:
        return _underway(draft, record, child)
    if ending.cause is None:
        return _succeed(draft, record)
    return _failed(draft, record, ending.cause)


def _stopped(draft: Draft) -> Ending | None:
    """Ends that we make: the deadline, suspension."""
    if deadlines.used_up(draft.status, draft.spec):
        return Ending(Cause(Disturbance.DEADLINE, deadline_sentence(draft.spec)))
    if draft.spec.suspend:
        return Ending(Cause(Disturbance.SUSPENDED, "spec.suspend is true."))
    return None


def _succeed(draft: Draft, record: AttemptRecord) -> Verdict | None:
    status = draft.status
    report = attempts.report_of(draft.seen, record.stage, record.number)
    assert report is not None
    attempts.close(record, Ending(), counted=False, now=draft.now)
    status.active_until = None
    progress.conclude(status, report)
    conditions.finish(status, record.stage, _success_sentence(status, record.stage), draft.now)
    gate = status.results.gate if record.stage is Stage.EVALUATE and status.results is not None else None
    if gate is not None and not gate.passed:
        where = f" The model is in {status.export.path} on the run volume." if status.export else ""
        return fail(draft, "GateRefused", f"{gate.sentence}{where}")
    return None


def _success_sentence(status: JobStatus, stage: Stage) -> str:
    if stage is Stage.PREPARE:
        rows = sum(dataset.train for dataset in status.datasets)
        return f"{rows} rows to train on, of {len(status.datasets)} datasets."
    if stage is Stage.TRAIN and status.export is not None:
        return f"Model of step {status.export.step} in {status.export.path}, {status.export.digest[:19]}."
    if stage is Stage.EVALUATE and status.results is not None:
        return f"{status.metric_text}: {status.results.gate.sentence}".strip(": ")
    if status.published is not None:
        return f"Published to {status.published.url or status.published.repo or status.published.path}."
    return "Succeeded."


def _failed(draft: Draft, record: AttemptRecord, cause: Cause) -> Verdict | None:
    """Record a failure and what follows from it by the policy."""
    status, seen = draft.status, draft.seen
    policy = policy_for(cause.reason)
    attempts.close(record, Ending(cause), policy.counted, draft.now)
    status.active_until = None
    if policy.counted:
        used = status.failures_counted.get(record.stage, 0) + 1
        status.failures_counted = status.failures_counted | {str(record.stage): used}
    if waits_for_user(cause.reason, record.stage, seen.environment.local):
        status.credentials_seen = credentials(seen)
        return None
    if policy.then is Then.FAIL:
        reason = "DeadlineExceeded" if cause.reason is Disturbance.DEADLINE else camel(cause.reason)
        return fail(draft, reason, _with_model(status, f"{record.stage} failed: {cause.sentence}"))
    limit = seen.spec.retry.limit
    if policy.counted and status.failures_counted[record.stage] > limit:
        sentence = f"{record.stage} failed: {cause.sentence} (retry.limit {limit} is used up)"
        return fail(draft, camel(cause.reason), _with_model(status, sentence))
    if policy.then is Then.SHRINK and shrunk(draft, record) is None:
        sentence = f"{cause.sentence} The longest document alone does not fit: shorten training.maxSequenceLength, "
        sentence += "shard over more GPUs, or use qlora."
        return fail(draft, camel(FailureClass.DOES_NOT_FIT), sentence)
    _back_off(draft, record, cause)
    return None


def _with_model(status: JobStatus, sentence: str) -> str:
    return sentence if status.export is None else f"{sentence} The model is in {status.export.path} on the run volume."


def _back_off(draft: Draft, record: AttemptRecord, cause: Cause) -> None:
    if cause.reason is Disturbance.SUSPENDED:
        return
    environment = draft.seen.environment
    seconds = backoff_seconds(
        f"{draft.seen.uid}/{record.stage}/{record.number}",
        attempts.failures_in_a_row(draft.status, record),
        environment.backoff_base_seconds,
        environment.backoff_cap_seconds,
    )
    draft.status.retry_at = deadlines.later(draft.now, seconds)


def _underway(draft: Draft, record: AttemptRecord, child: Child | None) -> Verdict:
    """The attempt goes on, or is on its way: say what it does or waits for, and when to look again."""
    seen, status = draft.seen, draft.status
    report = attempts.report_of(seen, record.stage, record.number)
    if child is None:
        return _not_made_yet(draft, record)
    draft.wake_at(attempts.evidence_due(record, child, report, seen))
    draft.wake_at(deadlines.active_deadline(status, seen.spec))
    reason, phase = RUNNING[record.stage]
    if child.queued:
        queue = seen.spec.pod_template.queue_name
        return Verdict(State.PROGRESSING, "Queued", f"Waits for its turn in queue {queue or '(Kueue)'}.", Phase.QUEUED)
    draft.wake_at(deadlines.startup_deadline(child, seen.spec))
    not_made = _not_made(draft, child)
    if not_made:
        return Verdict(State.PROGRESSING, "WaitingForPods", not_made, Phase.WAITING)
    waiting = min((pod.waiting for pod in child.pods if pod.waiting), default="")
    if waiting and not deadlines.all_run(child):
        return Verdict(State.PROGRESSING, "WaitingForPods", waiting, Phase.WAITING)
    if record.exited is not None:
        return Verdict(State.PROGRESSING, "Ending", "Pods have ended: reads what they left.", phase)
    if not deadlines.all_run(child):
        return starting(record.stage)
    return _running(draft, record, reason, phase)


def _not_made(draft: Draft, child: Child) -> str:
    """That pods are still not made, in a sentence: a quota's refusal is told to their controller, not to us."""
    made, wanted = len(child.pods), child.pods_expected
    if made >= wanted or child.created is None or child.failed or child.succeeded:
        return ""
    due = deadlines.later(child.created, POD_CREATION_SECONDS)
    if draft.now < due:
        draft.wake_at(due)
        return ""
    why = "A quota or an admission rule may refuse the rest: `kubectl get events` has its words."
    return f"{made} of {wanted} pods are made. {why}"


def _running(draft: Draft, record: AttemptRecord, reason: str, phase: Phase) -> Verdict:
    seen = draft.seen
    report = attempts.report_of(seen, record.stage, record.number)
    hang = deadlines.hang_deadline(record, report, seen.spec, seen.environment)
    if hang is not None and report is None and seen.now >= hang:
        sentence = "The report channel is broken: all pods run, but no report of this attempt ever arrived."
        return Verdict(State.PROGRESSING, "ReportChannelBroken", sentence, phase)
    draft.wake_at(hang)
    return Verdict(State.PROGRESSING, reason, f"{record.stage}, attempt {record.number}.", phase)


def _not_made_yet(draft: Draft, record: AttemptRecord) -> Verdict:
    older = attempts.of_older_job(draft.seen)
    if older:
        return Verdict(State.PROGRESSING, WAITING_FOR["Leftover"], older, Phase.WAITING)
    lacking = next(iter(draft.seen.missing), None)
    if lacking is None:
        return starting(record.stage)
    draft.wake_at(deadlines.later(draft.now, TRANSIENT_POLL_SECONDS))
    return Verdict(State.PROGRESSING, WAITING_FOR[lacking.kind], lacking.sentence, Phase.WAITING)


def listen_after_the_end(draft: Draft) -> None:
    """An attempt that was told to stop goes on reporting until it is gone: its last checkpoint counts."""
    stage = conditions.next_stage(draft.status, draft.spec)
    record = attempts.latest(draft.status, stage) if stage is not None else None
    report = attempts.report_of(draft.seen, record.stage, record.number) if record is not None else None
    if report is not None:
        draft.status.last_checkpoint = report.last_checkpoint or draft.status.last_checkpoint
