"""Kubernetes Events of a transition: made from the two statuses, so that each is emitted once, when it is recorded."""

from __future__ import annotations

from finetune_api.status import STAGE_CONDITION, AttemptRecord, Condition, ConditionType, JobStatus
from finetune_operator.decision.conditions import RUNNING, starting
from finetune_operator.decision.failure_policy import InfraFailure, condition_reason
from finetune_operator.decision.model import Event

QUIET_REASONS = frozenset({"Starting", "Ending", *(reason for reason, _ in RUNNING.values())})
"""Reasons of Reconciling that have another Event, or need none."""
REACHED = (*STAGE_CONDITION.values(), ConditionType.COMPLETE, ConditionType.SUSPENDED)
"""Conditions of which it is told that they have come true."""


def between(old: JobStatus, new: JobStatus) -> tuple[Event, ...]:
    """The Events of writing `new` over `old`; none for progress."""
    reached = [Event("Normal", str(kind), _condition(new, kind).message) for kind in REACHED if _turned(old, new, kind)]
    return (*_attempts(old, new), *reached, *_waiting(old, new), *_failed(old, new))


def _attempts(old: JobStatus, new: JobStatus) -> list[Event]:
    known = {(record.stage, record.number) for record in old.attempts}
    failed = _just_failed(old, new)
    events = [_ended(record, failed) for record in _stopped(old, new)]
    for record in new.attempts:
        started = record.outcome == "running" and (record.stage, record.number) not in known
        # The first attempt of a later stage is told by the success of the stage before it.
        if started and (record.number > 1 or len(new.attempts) == 1):
            events.append(Event("Normal", "AttemptStarted", starting(record).message))
    return events


def _stopped(old: JobStatus, new: JobStatus) -> list[AttemptRecord]:
    """Attempts that ended without success."""
    over = {(record.stage, record.number) for record in old.attempts if record.outcome != "running"}
    ended = [record for record in new.attempts if record.outcome in ("failed", "suspended")]
    return [record for record in ended if (record.stage, record.number) not in over]


def _ended(record: AttemptRecord, failed: Condition | None) -> Event:
    """How an attempt ended; if the job failed by it, with the message of the job, which gets no other Event."""
    if record.outcome == "suspended":
        message = f"Stopping {record.stage} (attempt {record.number}) after saving a checkpoint."
        return Event("Normal", "Suspending", message)
    rank = "" if record.rank is None else f" on rank {record.rank}"
    reason = condition_reason(str(record.reason or InfraFailure.NO_REPORT)) if failed is None else failed.reason
    sentence = record.message if failed is None else failed.message.removeprefix(f"{record.stage} failed: ")
    return Event("Warning", reason, f"{record.stage} (attempt {record.number}) failed{rank}: {sentence}")


def _waiting(old: JobStatus, new: JobStatus) -> list[Event]:
    now, before = new.condition(ConditionType.RECONCILING), old.condition(ConditionType.RECONCILING)
    if now is None or now.status != "True" or now.reason in QUIET_REASONS:
        return []
    if before is not None and before.status == "True" and before.reason == now.reason:
        return []
    return [Event("Warning" if now.reason.startswith("WaitingFor") else "Normal", now.reason, now.message)]


def _failed(old: JobStatus, new: JobStatus) -> list[Event]:
    """That the job has failed, unless the Event of its last attempt says so."""
    failed = _just_failed(old, new)
    if failed is None or any(record.outcome == "failed" for record in _stopped(old, new)):
        return []
    return [Event("Warning", failed.reason, failed.message)]


def _just_failed(old: JobStatus, new: JobStatus) -> Condition | None:
    """Why the job has failed, if it just has."""
    failed = ConditionType.FAILED
    return _condition(new, failed) if _turned(old, new, failed) else None


def _turned(old: JobStatus, new: JobStatus, kind: ConditionType) -> bool:
    return new.is_true(kind) and not old.is_true(kind)


def _condition(status: JobStatus, kind: ConditionType) -> Condition:
    condition = status.condition(kind)
    assert condition is not None
    return condition
