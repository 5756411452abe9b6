"""`finetune suspend NAME`."""

from __future__ import annotations

from finetune_operator.commands._cluster import Context, Name, Namespace, exit_code, jobs_in, status_of
from finetune_operator.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError


async def suspend(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Suspend a job: save a checkpoint, stop, and release its GPUs. Continue with `finetune resume`."""
    async with jobs_in(namespace, context) as jobs:
        job = await jobs.get(name)
        status = status_of(job)
        if exit_code(status) != EXIT_INTERRUPTED:
            raise UserError(f"{name} has already ended ({status.phase}) and cannot be suspended.", EXIT_FAILED)
        if job["spec"].get("suspend"):
            print(f"{name} is already suspended.")
            return
        await jobs.merge(name, {"spec": {"suspend": True}})
    print(f"{name} stops after its next checkpoint; continue with `finetune resume {name}`.")
