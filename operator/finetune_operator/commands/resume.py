"""`finetune resume NAME`."""

from __future__ import annotations

from finetune_operator.commands._cluster import Context, Name, Namespace, jobs_in, status_of


def resume(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Let a suspended job go on from its last checkpoint."""
    jobs = jobs_in(namespace, context)
    job = jobs.get(name)
    if not job["spec"].get("suspend"):
        print(f"{name} is not suspended; it is {status_of(job).phase}.")
        return
    jobs.merge(name, {"spec": {"suspend": False}})
    checkpoint = status_of(job).last_checkpoint
    print(f"{name} goes on{f' from step {checkpoint.step}' if checkpoint is not None else ''}.")
