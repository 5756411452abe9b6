"""What keeps the next attempt from being entered: a user who is asked for, something missing, a backoff."""

from __future__ import annotations

from finetune_api.base import Stage
from finetune_api.report import FailureClass
from finetune_api.status import Phase
from finetune_operator.decision import attempts, deadlines
from finetune_operator.decision.conditions import State, Verdict
from finetune_operator.decision.draft import WAITING_FOR, Draft, credentials, fail


def waits(draft: Draft, stage: Stage) -> Verdict | None:
    """What keeps the next attempt from being entered, if anything."""
    for wait in (_wait_for_user, _wait_for_missing, _wait_for_backoff):
        verdict = wait(draft, stage)
        if verdict is not None:
            return verdict
    draft.status.waiting_since = None
    return None


def _wait_for_user(draft: Draft, stage: Stage) -> Verdict | None:
    status, seen = draft.status, draft.seen
    if not status.credentials_seen:
        return None
    record = attempts.latest(status, stage)
    if record is None or status.credentials_seen != credentials(seen):
        status.credentials_seen = ""
        return None
    status.waiting_since = status.waiting_since or seen.now
    until = deadlines.user_deadline(status, seen.spec)
    if until is not None and seen.now >= until:
        return fail(draft, "DeadlineExceeded", f"Nobody helped in time: {record.message}")
    draft.wake_at(until)
    way = "Goes on when the Secret changes or the annotation finetune.dev/retry gets a new value."
    reason = "WaitingForCredentials" if record.reason == FailureClass.NO_ACCESS else "WaitingForUser"
    return Verdict(State.PROGRESSING, reason, f"{record.message} {way}", Phase.WAITING)


def _wait_for_missing(draft: Draft, stage: Stage) -> Verdict | None:
    status, seen = draft.status, draft.seen
    lacking = next((m for m in seen.missing if m.kind in ("Secret", "PersistentVolumeClaim")), None)
    if lacking is None:
        return None
    status.waiting_since = status.waiting_since or seen.now
    until = deadlines.user_deadline(status, seen.spec)
    if until is not None and seen.now >= until:
        return fail(draft, "DeadlineExceeded", f"Nobody helped in time: {lacking.sentence}")
    draft.wake_at(until)
    return Verdict(State.PROGRESSING, WAITING_FOR[lacking.kind], lacking.sentence, Phase.WAITING)


def _wait_for_backoff(draft: Draft, stage: Stage) -> Verdict | None:
    at = draft.status.retry_at
    if at is None or draft.now >= at:
        return None
    draft.wake_at(at)
    record = attempts.latest(draft.status, stage)
    why = f" after: {record.message}" if record is not None else "."
    return Verdict(State.PROGRESSING, "BackingOff", f"The next attempt at {stage} follows{why}", Phase.BACKING_OFF)
