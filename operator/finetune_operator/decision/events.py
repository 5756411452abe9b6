"""Kubernetes Events of a transition: made from the two statuses, so that each is told once, when it is recorded."""

from __future__ import annotations

from finetune_api.base import STAGES
from finetune_api.status import STAGE_CONDITION, AttemptRecord, Condition, ConditionType, JobStatus
from finetune_operator.decision.failure_policy import Disturbance, camel
from finetune_operator.decision.model import Event

QUIET_REASONS = frozenset({"Starting", "Preparing", "Training", "Evaluating", "Publishing", "Ending"})
"""Reasons of Reconciling that an Event of their own says already, or nobody needs to hear."""


def between(old: JobStatus, new: JobStatus) -> tuple[Event, ...]:
    """What to tell when `new` has been written over `old`; nothing for progress."""
    return (*_attempts(old, new), *_stages(old, new), *_waiting(old, new), *_ends(old, new))


def _attempts(old: JobStatus, new: JobStatus) -> list[Event]:
    before = {(record.stage, record.number): record for record in old.attempts}
    told = []
    for record in new.attempts:
        known = before.get((record.stage, record.number))
        if known is None and record.outcome == "running" and (record.number > 1 or len(new.attempts) == 1):
            told.append(Event("Normal", "AttemptStarted", f"Starts {record.stage}, attempt {record.number}."))
    return [_ended(record, _verdict(old, new)) for record in _stopped(old, new)] + told


def _stopped(old: JobStatus, new: JobStatus) -> list[AttemptRecord]:
    """Attempts that ended without success."""
    over = {(record.stage, record.number) for record in old.attempts if record.outcome != "running"}
    ended = [record for record in new.attempts if record.outcome in ("failed", "suspended")]
    return [record for record in ended if (record.stage, record.number) not in over]


def _ended(record: AttemptRecord, verdict: Condition | None) -> Event:
    """How an attempt ended; if the job failed by it, in the words of the verdict, which are then not told again."""
    if record.outcome == "suspended":
        return Event("Normal", "Suspending", f"Stops {record.stage} attempt {record.number} after a checkpoint.")
    rank = "" if record.rank is None else f" (rank {record.rank})"
    reason = camel(str(record.reason or Disturbance.NO_REPORT)) if verdict is None else verdict.reason
    sentence = record.message if verdict is None else verdict.message.removeprefix(f"{record.stage} failed: ")
    return Event("Warning", reason, f"{record.stage} attempt {record.number} failed{rank}: {sentence}")


def _stages(old: JobStatus, new: JobStatus) -> list[Event]:
    turned = [STAGE_CONDITION[s] for s in STAGES if _turned_true(old, new, STAGE_CONDITION[s])]
    return [Event("Normal", str(kind), _condition(new, kind).message) for kind in turned]


def _waiting(old: JobStatus, new: JobStatus) -> list[Event]:
    now, before = new.condition(ConditionType.RECONCILING), old.condition(ConditionType.RECONCILING)
    if now is None or now.status != "True" or now.reason in QUIET_REASONS:
        return []
    if before is not None and before.status == "True" and before.reason == now.reason:
        return []
    kind = "Warning" if now.reason.startswith("WaitingFor") else "Normal"
    return [Event("Warning" if kind == "Warning" else "Normal", now.reason, now.message)]


def _ends(old: JobStatus, new: JobStatus) -> list[Event]:
    turned = [kind for kind in (ConditionType.COMPLETE, ConditionType.SUSPENDED) if _turned_true(old, new, kind)]
    told = [Event("Normal", str(kind), _condition(new, kind).message) for kind in turned]
    verdict = _verdict(old, new)
    if verdict is not None and not any(record.outcome == "failed" for record in _stopped(old, new)):
        told.append(Event("Warning", verdict.reason, verdict.message))
    return told


def _verdict(old: JobStatus, new: JobStatus) -> Condition | None:
    """Why the job has failed, if it just has."""
    failed = ConditionType.FAILED
    return _condition(new, failed) if _turned_true(old, new, failed) else None


def _turned_true(old: JobStatus, new: JobStatus, kind: ConditionType) -> bool:
    return new.is_true(kind) and not old.is_true(kind)


def _condition(status: JobStatus, kind: ConditionType) -> Condition:
    condition = status.condition(kind)
    assert condition is not None
    return condition
