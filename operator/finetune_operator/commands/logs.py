"""`finetune logs NAME`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_api.base import Stage
from finetune_operator.commands._cluster import Context, Name, Namespace, jobs_in
from finetune_operator.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from finetune_operator.cluster.as_user.logs import LogSource


async def logs(
    name: Name,
    stage: Annotated[Stage | None, typer.Option(help="Stage; default: the last one that has pods.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Attempt; default: the newest.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Only the pod of this rank; default: all pods, lines prefixed by node.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stream the logs until the pods have terminated.")
    ] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines of each pod, this many.")] = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print pod logs."""
    from finetune_operator.cluster.as_user.logs import log_sources, newest, read_logs

    async with jobs_in(namespace, context) as jobs:
        job = await jobs.get(name)
        sources = newest(await log_sources(jobs.api, jobs.namespace, job["metadata"]["uid"]), stage, attempt)
        if not sources:
            raise UserError(_no_pods(name, stage, attempt), EXIT_FAILED)
        sources = _of_rank(sources, rank, int(job["spec"].get("topology", {}).get("gpusPerNode") or 1))
        ready = sources if follow else [source for source in sources if source.started]
        for source in sources:
            if source not in ready:
                print(f"{source.name} has not started: {source.waiting}.", file=sys.stderr)
        async for line in read_logs(jobs.api, jobs.namespace, ready, tail=tail, follow=follow):
            print(f"{line.source.node_rank}| {line.text}" if len(sources) > 1 else line.text, flush=follow)


def _of_rank(sources: list[LogSource], rank: int | None, ranks_per_node: int) -> list[LogSource]:
    """The pod of that rank: ranks are numbered node after node."""
    if rank is None:
        return sources
    chosen = [source for source in sources if source.node_rank == rank // ranks_per_node]
    if not chosen:
        ranks = len(sources) * ranks_per_node
        raise UserError(f"There is no rank {rank}: {sources[0].stage} has ranks 0 to {ranks - 1}.")
    return chosen


def _no_pods(name: str, stage: Stage | None, attempt: int | None) -> str:
    missing = f"stage {stage} of {name}" if stage else name
    missing += f" in attempt {attempt}" if attempt else ""
    return f"No pods are left of {missing}; their logs are on the run volume, in logs/<stage>-<attempt>/."
