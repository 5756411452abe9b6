"""What is done about a status that is persisted: children made and deleted, and when to look again."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.decision import attempts, conditions, deadlines
from finetune_operator.decision.draft import Draft
from finetune_operator.decision.model import Action, CleanUp, DeleteChild, EnsureShared, StartAttempt


def actions(draft: Draft) -> tuple[Action, ...]:
    """What follows from a status that is persisted."""
    status, seen = draft.status, draft.seen
    if seen.invalid:
        return ()
    due = clean_up_at(draft)
    if due is not None and seen.now >= due and seen.children:
        return (CleanUp(),)
    doomed = tuple(_doomed(draft))
    record = attempts.live(status)
    if record is None or attempts.child_of(seen, record) is not None:
        return doomed
    if attempts.of_older_job(seen):
        return doomed
    return (*doomed, EnsureShared(), StartAttempt(attempts.to_start(seen, record)))


def _doomed(draft: Draft) -> list[DeleteChild]:
    """Children whose attempt has ended without success. A job that failed keeps pods that ended, for their logs."""
    status, found = draft.status, []
    for child in draft.seen.children:
        record = attempts.find(status, child.stage, child.number)
        going = record is not None and record.outcome in ("running", "succeeded")
        if going or not child.ours or not child.exists or child.deleting or child.foreign:
            continue
        if conditions.terminal(status) and all(deadlines.ended(pod) for pod in child.pods):
            continue
        why = record.message if record is not None else "no attempt of that number is in the status"
        found.append(DeleteChild(child.stage, child.number, why))
    return found


def clean_up_at(draft: Draft) -> datetime | None:
    ttl = draft.spec.cleanup.ttl_seconds_after_finished
    ended = draft.status.completion_time
    if ttl is None or ended is None or not conditions.terminal(draft.status) or not draft.seen.children:
        return None
    return deadlines.later(ended, ttl)


def requeue(draft: Draft) -> float | None:
    """Seconds to the nearest moment at which the decision may change by itself."""
    ahead = [(moment - draft.now).total_seconds() for moment in draft.wakes]
    return max(min(ahead), 1.0) if ahead else None
