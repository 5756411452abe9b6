"""`finetune resume NAME`."""

from __future__ import annotations

from finetune_operator.commands._cluster import Context, Name, Namespace, jobs_in, status_of


async def resume(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Resume a suspended job from its last checkpoint."""
    async with jobs_in(namespace, context) as jobs:
        job = await jobs.get(name)
        if not job["spec"].get("suspend"):
            print(f"{name} is not suspended (phase {status_of(job).phase}).")
            return
        await jobs.merge(name, {"spec": {"suspend": False}})
    checkpoint = status_of(job).last_checkpoint
    print(f"{name} is resuming{f' from step {checkpoint.step}' if checkpoint is not None else ''}.")
