"""`finetune retry NAME`."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune_api.status import ConditionType, Phase
from finetune_operator.commands._cluster import Context, Name, Namespace, jobs_in, status_of
from finetune_operator.decision.model import RETRY_ANNOTATION
from finetune_operator.errors import EXIT_FAILED, UserError


def retry(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Try the failed stage of a job again, with a fresh budget; what is finished is kept."""
    jobs = jobs_in(namespace, context)
    job = jobs.get(name)
    status = status_of(job)
    if status.is_true(ConditionType.COMPLETE):
        raise UserError(f"{name} is complete: there is nothing to try again.", EXIT_FAILED)
    if not status.is_true(ConditionType.FAILED) and status.phase not in (Phase.WAITING, Phase.BACKING_OFF):
        raise UserError(f"{name} has not failed; it is {status.phase}.", EXIT_FAILED)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    jobs.merge(name, {"metadata": {"annotations": {RETRY_ANNOTATION: now}}})
    held = f"; it is suspended as well: finetune resume {name}" if job["spec"].get("suspend") else ""
    print(f"{name} tries {status.stage or 'its stage'} again{held}.")
