"""`finetune suspend NAME`."""

from __future__ import annotations

from finetune_operator.commands._cluster import Context, Name, Namespace, exit_code, jobs_in, status_of
from finetune_operator.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError


def suspend(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Stop a job after a checkpoint and give its GPUs back; `finetune resume` lets it go on from there."""
    jobs = jobs_in(namespace, context)
    job = jobs.get(name)
    status = status_of(job)
    if exit_code(status) != EXIT_INTERRUPTED:
        raise UserError(f"{name} has ended ({status.phase}): there is nothing to suspend.", EXIT_FAILED)
    if job["spec"].get("suspend"):
        print(f"{name} is suspended already.")
        return
    jobs.merge(name, {"spec": {"suspend": True}})
    print(f"{name} stops after its next checkpoint; finetune resume {name} lets it go on from there.")
