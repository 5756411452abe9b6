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


def logs(
    name: Name,
    stage: Annotated[Stage | None, typer.Option(help="Of which stage; else the one that came furthest.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of which attempt; else the newest.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Only the pod in which that rank runs; else all pods, each line marked.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the pods have ended.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Only so many last lines of each pod.")] = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print what the pods of a job's stage have written."""
    from finetune_operator.cluster.as_user.logs import newest, read, sources

    jobs = jobs_in(namespace, context)
    job = jobs.get(name)
    found = newest(sources(jobs.connection, jobs.namespace, job["metadata"]["uid"]), stage, attempt)
    if not found:
        raise UserError(_nothing_left(job, stage, attempt), EXIT_FAILED)
    found = _of_rank(found, rank, int(job["spec"].get("topology", {}).get("gpusPerNode") or 1))
    ready = found if follow else [source for source in found if source.started]
    for source in found:
        if source not in ready:
            print(f"{source.name} has not started: {source.waiting}.", file=sys.stderr)
    marked = len(found) > 1
    for line in read(jobs.connection, jobs.namespace, ready, tail=tail, follow=follow):
        print(f"{line.source.node_rank}| {line.text}" if marked else line.text, flush=follow)


def _of_rank(found: list[LogSource], rank: int | None, ranks_per_node: int) -> list[LogSource]:
    """The pod of that rank: ranks are numbered node after node."""
    if rank is None:
        return found
    chosen = [source for source in found if source.node_rank == rank // ranks_per_node]
    if not chosen:
        ranks = len(found) * ranks_per_node
        raise UserError(f"There is no rank {rank}: {found[0].stage} has ranks 0 to {ranks - 1}.")
    return chosen


def _nothing_left(job: dict[str, object], stage: Stage | None, attempt: int | None) -> str:
    wanted = f"of {stage}" if stage else "of it"
    wanted += f", attempt {attempt}," if attempt else ""
    return f"There are no pods {wanted} (any more); what they wrote is on the run volume, in logs/<stage>-<attempt>/."
