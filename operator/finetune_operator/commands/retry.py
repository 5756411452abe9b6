"""`finetune retry NAME`."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune_api.status import ConditionType, Phase
from finetune_operator.commands._cluster import Context, Name, Namespace, jobs_in, status_of
from finetune_operator.decision.model import RETRY_ANNOTATION
from finetune_operator.errors import EXIT_FAILED, UserError


async def retry(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Retry the failed stage of a job, with a fresh retry budget; completed stages are kept."""
    async with jobs_in(namespace, context) as jobs:
        job = await jobs.get(name)
        status = status_of(job)
        if status.is_true(ConditionType.COMPLETE):
            raise UserError(f"{name} is complete; there is nothing to retry.", EXIT_FAILED)
        if not status.is_true(ConditionType.FAILED) and status.phase not in (Phase.WAITING, Phase.BACKING_OFF):
            raise UserError(f"{name} has not failed (phase {status.phase}).", EXIT_FAILED)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        await jobs.merge(name, {"metadata": {"annotations": {RETRY_ANNOTATION: now}}})
    suspended = f", but it is suspended: run `finetune resume {name}`" if job["spec"].get("suspend") else ""
    print(f"{name} will retry {status.stage or 'its stage'}{suspended}.")
