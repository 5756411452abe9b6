"""Observation → Decision: the one place where it is decided what happens to a job next. Pure.

A decision first brings the status up to date. Only if that changes no conclusion, that is, if the persisted status
already says the same, does it act: what is destroyed has been recorded, and what is started is known by its record,
so that the operator may crash at any moment.

How to read the rest: `decide` drafts the status from top to bottom (`_evaluate`, `_advance`) and derives the actions.
A running attempt, and how its end is recognised and recorded, is in running_attempt.py; what follows from a failure
is the table in failure_policy.py. What the next attempt waits for, and its start, is in next_attempt.py.
The values that go in and out are in model.py; each other module is one tool of these four.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_api.report import FailureClass
from finetune_api.status import ConditionType, JobStatus, Phase
from finetune_operator.decision import attempts, conditions, deadlines, events, progress
from finetune_operator.decision.conditions import JobCondition, State, waiting
from finetune_operator.decision.failure_policy import condition_reason
from finetune_operator.decision.model import (
    RETRY_ANNOTATION,
    Action,
    CleanUp,
    Decision,
    DeleteChild,
    EnsureShared,
    Observation,
    RunningAttempt,
    StartAttempt,
)
from finetune_operator.decision.next_attempt import blocked_by, start_next_attempt
from finetune_operator.decision.running_attempt import handle_running_attempt, take_last_checkpoint
from finetune_operator.decision.status_draft import StatusDraft


def decide(observation: Observation) -> Decision:
    """What to record of a job and what to do about it. The same observation gives the same decision."""
    if observation.deleting or observation.unreadable:
        return Decision(observation.status, observation.wire)
    persisted = observation.wire
    observation = replace(observation, now=observation.now.replace(microsecond=0))
    # A deep copy that pydantic makes in a fifth of the time of model_copy(deep=True).
    draft = StatusDraft(observation, JobStatus.model_validate(observation.status.model_dump()))
    record = attempts.running(draft.status)
    running = observation.running(record) if record is not None else None
    _initialise(draft)
    condition = _evaluate(draft, running)
    conditions.set_conditions(draft.status, condition, observation.spec, observation.now)
    wire = draft.status.to_wire()
    if progress.conclusions(wire) != progress.conclusions(persisted):
        return Decision(draft.status, wire, events=events.between(observation.status, draft.status), settled=False)
    return Decision(
        draft.status,
        wire,
        actions=_actions(draft, running),
        requeue_after=draft.requeue_after,
        waits_for_removal=_waits_for_removal(draft, running),
    )


def _initialise(draft: StatusDraft) -> None:
    status, observation = draft.status, draft.observation
    if status.start_time is None:
        status.start_time = observation.now
        status.observed_retry = observation.annotations.get(RETRY_ANNOTATION, "")
    status.observed_generation = observation.generation


def _evaluate(draft: StatusDraft, running: RunningAttempt | None) -> JobCondition:
    """Go from what is settled to what is open: retry, ends, the running attempt, suspension, the next attempt."""
    if draft.observation.invalid:
        return _reject_spec(draft)
    _observe_retry(draft)
    if conditions.terminal(draft.status):
        return _ended(draft)
    if running is None:
        take_last_checkpoint(draft)
    else:
        condition = handle_running_attempt(draft, running)
        if condition is not None:
            return condition
    return _advance(draft)


def _advance(draft: StatusDraft) -> JobCondition:
    """No attempt runs: the job is complete, or suspended, or waits, or starts its next attempt."""
    status, spec = draft.status, draft.spec
    stage = conditions.next_stage(status, spec)
    if stage is None:
        return _complete(draft)
    if deadlines.used_up(status, spec):
        return draft.fail("DeadlineExceeded", deadlines.used_up_message(spec))
    earlier_attempt = attempts.blocked_by_earlier_attempt(draft.observation, status)
    if spec.suspend:
        status.retry_at = None
        if earlier_attempt:
            return JobCondition(State.PROGRESSING, "Suspending", earlier_attempt, Phase.SUSPENDING)
        message = "Suspended. Set spec.suspend to false to resume."
        return JobCondition(State.SUSPENDED, "Suspended", message, Phase.SUSPENDED)
    if earlier_attempt:
        return waiting("WaitingForPreviousAttempt", earlier_attempt)
    return blocked_by(draft, stage) or start_next_attempt(draft, stage)


def _observe_retry(draft: StatusDraft) -> None:
    """Act on a new value of the retry annotation: a fresh budget for the failed stage; finished ones are kept."""
    status, observation = draft.status, draft.observation
    value = observation.annotations.get(RETRY_ANNOTATION, "")
    if value == status.observed_retry or not value:
        return
    status.observed_retry = value
    if status.is_true(ConditionType.COMPLETE):
        return
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True":
        if failed.reason == "GateRefused":
            conditions.set_condition(
                status, ConditionType.EVALUATED, False, conditions.PENDING, "Will run again.", draft.now
            )
        message = f"Retry requested by the annotation {RETRY_ANNOTATION}."
        conditions.set_condition(status, ConditionType.FAILED, False, "Retried", message, draft.now)
        status.completion_time = None
    stage = conditions.next_stage(status, draft.spec)
    status.failures_counted = {name: n for name, n in status.failures_counted.items() if name != stage}
    for record in status.attempts:
        record.forgiven = record.forgiven or (record.stage is stage and record.outcome == "failed")
    draft.stop_waiting()


def _complete(draft: StatusDraft) -> JobCondition:
    status = draft.status
    status.completion_time = status.completion_time or draft.now
    draft.stop_waiting()
    parts = [status.metric_text, status.published.url if status.published is not None else ""]
    summary = "; ".join(part for part in parts if part)
    message = f"Complete: {summary}." if summary else "Complete."
    return JobCondition(State.COMPLETE, "Complete", message, Phase.COMPLETE)


def _ended(draft: StatusDraft) -> JobCondition:
    """What was concluded once stays, whatever is observed now."""
    draft.requeue_by(_cleanup_time(draft))
    complete = draft.status.is_true(ConditionType.COMPLETE)
    state, phase = (State.COMPLETE, Phase.COMPLETE) if complete else (State.FAILED, Phase.FAILED)
    condition = draft.status.condition(ConditionType.COMPLETE if complete else ConditionType.FAILED)
    assert condition is not None
    return JobCondition(state, condition.reason, condition.message, phase)


def _reject_spec(draft: StatusDraft) -> JobCondition:
    """A spec that cannot be read: a new job fails; one that has begun is left alone, and the status says so."""
    status, sentence = draft.status, draft.observation.invalid
    if conditions.terminal(status):
        return _ended(draft)
    if status.attempts_started:
        message = f"This version of the operator cannot read the spec and leaves the job alone: {sentence}"
        return JobCondition(State.PROGRESSING, "SpecUnreadable", message, status.phase)
    return draft.fail(condition_reason(FailureClass.BAD_SPEC), sentence)


# What follows from a status that is persisted -----------------------------------------------------------


def _actions(draft: StatusDraft, running: RunningAttempt | None) -> tuple[Action, ...]:
    observation = draft.observation
    if observation.invalid:
        return ()
    cleanup_time = _cleanup_time(draft)
    if cleanup_time is not None and draft.now >= cleanup_time:
        return (CleanUp(),)
    deletions = tuple(_deletions(draft))
    if running is None or running.child is not None or attempts.blocked_by_earlier_job(observation):
        return deletions
    return (*deletions, EnsureShared(), StartAttempt(attempts.to_start(observation, running.record)))


def _deletions(draft: StatusDraft) -> list[DeleteChild]:
    """Children whose attempt ended without success, or whose pods are kept running by a container of somebody else.

    A job that failed keeps pods that have ended, for their logs.
    """
    deletions = []
    for child in draft.observation.children:
        record = attempts.find(draft.status, child.stage, child.number)
        lingering = next((pod for pod in child.pods if pod.lingering), None)
        keep = record is not None and (record.outcome == "running" or (record.outcome == "succeeded" and not lingering))
        if keep or not child.ours or not child.exists or child.deleting or child.foreign:
            continue
        if conditions.terminal(draft.status) and all(pod.ended for pod in child.pods) and not lingering:
            continue
        why = record.message if record is not None else "no attempt of that number is in the status"
        if lingering is not None:
            why = f"container {lingering.lingering} of pod {lingering.name} keeps running"
        deletions.append(DeleteChild(child.stage, child.number, why))
    return deletions


def _cleanup_time(draft: StatusDraft) -> datetime | None:
    ttl = draft.spec.cleanup.ttl_seconds_after_finished
    ended = draft.status.completion_time
    if ttl is None or ended is None or not conditions.terminal(draft.status) or not draft.observation.children:
        return None
    return deadlines.later(ended, ttl)


def _waits_for_removal(draft: StatusDraft, running: RunningAttempt | None) -> bool:
    if conditions.terminal(draft.status):
        return False
    if running is not None:
        return bool(attempts.blocked_by_earlier_job(draft.observation))
    return bool(attempts.blocked_by_earlier_attempt(draft.observation, draft.status))
