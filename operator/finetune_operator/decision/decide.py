"""Observation → Decision: the one place where it is decided what happens to a job next. Pure.

A decision first brings the status up to date. Only if that changes no conclusion, that is, if the persisted
status already says what we would say, does it act: what is destroyed has been recorded, and what is started
is known by its record, so that a crash at any moment is gone on from.
"""

from __future__ import annotations

from dataclasses import replace

from finetune_api.base import Stage
from finetune_api.report import FailureClass
from finetune_api.status import ConditionType, JobStatus, Phase
from finetune_operator.decision import attempts, conditions, deadlines, events, progress
from finetune_operator.decision.acting import actions, clean_up_at, requeue
from finetune_operator.decision.conditions import State, Verdict
from finetune_operator.decision.draft import Draft, Planner, deadline_sentence, fail
from finetune_operator.decision.entering import enter
from finetune_operator.decision.failure_policy import camel
from finetune_operator.decision.following import follow, listen_after_the_end
from finetune_operator.decision.model import Decision, Observation
from finetune_operator.decision.waiting import waits

__all__ = ["RETRY_ANNOTATION", "Planner", "decide"]

RETRY_ANNOTATION = "finetune.dev/retry"


def decide(seen: Observation, planner: Planner | None = None) -> Decision:
    """What to record of a job and what to do about it. The same observation gives the same decision."""
    if seen.deleting:
        return Decision(seen.status, seen.wire)
    before = seen.wire
    seen = replace(seen, now=seen.now.replace(microsecond=0))
    # A deep copy that pydantic makes in a fifth of the time of model_copy(deep=True).
    draft = Draft(seen, JobStatus.model_validate(seen.status.model_dump()), planner)
    _touch(draft)
    verdict = _judge(draft)
    conditions.write(draft.status, verdict, seen.spec, seen.now)
    wire = draft.status.to_wire()
    if progress.material(wire) != progress.material(before):
        return Decision(draft.status, wire, events=events.between(seen.status, draft.status), requeue_after=0.0)
    return Decision(draft.status, wire, actions(draft), requeue_after=requeue(draft))


def _touch(draft: Draft) -> None:
    status, seen = draft.status, draft.seen
    if status.start_time is None:
        status.start_time = seen.now
        status.observed_retry = seen.annotations.get(RETRY_ANNOTATION, "")
    status.observed_generation = seen.generation


def _judge(draft: Draft) -> Verdict:
    """Walk from what is settled to what is open: retry, ends, the running attempt, suspension, the next attempt."""
    if draft.seen.invalid:
        return _invalid(draft)
    _observe_retry(draft)
    if conditions.terminal(draft.status):
        return _ended(draft)
    record = attempts.live(draft.status)
    if record is not None:
        verdict = follow(draft, record)
        if verdict is not None:
            return verdict
    else:
        listen_after_the_end(draft)
    return _go_on(draft)


def _go_on(draft: Draft) -> Verdict:
    """No attempt runs: the job is complete, or suspended, or waits, or enters its next attempt."""
    status, spec = draft.status, draft.spec
    stage = conditions.next_stage(status, spec)
    if stage is None:
        return _complete(draft)
    if deadlines.used_up(status, spec):
        return fail(draft, "DeadlineExceeded", deadline_sentence(spec))
    blocked = attempts.blocking(draft.seen, status)
    if spec.suspend:
        status.retry_at = None
        if blocked:
            return Verdict(State.PROGRESSING, "Suspending", blocked, Phase.SUSPENDING)
        return Verdict(State.SUSPENDED, "Suspended", "Suspended: set spec.suspend to false to go on.", Phase.SUSPENDED)
    if blocked:
        return Verdict(State.PROGRESSING, "WaitingForPreviousAttempt", blocked, Phase.WAITING)
    return waits(draft, stage) or enter(draft, stage)


def _observe_retry(draft: Draft) -> None:
    """A new value of the retry annotation gives the failed stage a fresh budget and keeps the finished ones."""
    status, seen = draft.status, draft.seen
    asked = seen.annotations.get(RETRY_ANNOTATION, "")
    if asked == status.observed_retry or not asked:
        return
    status.observed_retry = asked
    if status.is_true(ConditionType.COMPLETE):
        return
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True":
        if failed.reason == "GateRefused":
            conditions.reopen(status, Stage.EVALUATE, seen.now)
        conditions.put(status, ConditionType.FAILED, False, "Retried", "Retried by annotation.", seen.now)
        status.completion_time = None
    stage = conditions.next_stage(status, seen.spec)
    status.failures_counted = {name: n for name, n in status.failures_counted.items() if name != stage}
    for record in status.attempts:
        record.forgiven = record.forgiven or (record.stage is stage and record.outcome == "failed")
    status.retry_at, status.waiting_since, status.credentials_seen = None, None, ""


def _complete(draft: Draft) -> Verdict:
    status = draft.status
    status.completion_time = status.completion_time or draft.now
    status.retry_at, status.waiting_since, status.credentials_seen = None, None, ""
    parts = [status.metric_text, status.published.url if status.published is not None else ""]
    told = "; ".join(part for part in parts if part)
    return Verdict(State.COMPLETE, "Complete", f"Complete: {told}." if told else "Complete.", Phase.COMPLETE)


def _ended(draft: Draft) -> Verdict:
    """What was concluded once stays, whatever the world looks like now."""
    status = draft.status
    for kind, state, phase in (
        (ConditionType.COMPLETE, State.COMPLETE, Phase.COMPLETE),
        (ConditionType.FAILED, State.FAILED, Phase.FAILED),
    ):
        condition = status.condition(kind)
        if condition is not None and condition.status == "True":
            draft.wake_at(clean_up_at(draft))
            return Verdict(state, condition.reason, condition.message, phase)
    raise AssertionError("only called for a job that has ended")


def _invalid(draft: Draft) -> Verdict:
    """A spec that cannot be read: a new job fails; one that has begun is left alone and says so."""
    status, sentence = draft.status, draft.seen.invalid
    if conditions.terminal(status):
        return _ended(draft)
    if status.attempts_started:
        sentence = f"This version of the operator cannot read the spec and leaves the job alone: {sentence}"
        return Verdict(State.PROGRESSING, "SpecUnreadable", sentence, status.phase)
    return fail(draft, camel(FailureClass.BAD_SPEC), sentence)
