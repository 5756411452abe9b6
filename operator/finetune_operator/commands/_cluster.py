"""What the cluster commands share: their options, and access to a namespace's jobs. Imports no client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_operator.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_GATE_REFUSED, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from finetune_api.status import JobStatus
    from finetune_operator.cluster.as_user.jobs import Jobs

NOT_SERVED_AFTER = timedelta(seconds=20)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the job.")]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace", "-n", metavar="NAMESPACE", help="Namespace; default: that of the kubeconfig's context."
    ),
]
Context = Annotated[
    str | None, typer.Option("--context", metavar="CONTEXT", help="Kubeconfig context; default: the current one.")
]


@asynccontextmanager
async def jobs_in(namespace: str | None, context: str | None) -> AsyncIterator[Jobs]:
    """The jobs of the namespace that was named, or of the kubeconfig's. Raises ClusterError for any ApiError within."""
    from finetune_operator.cluster.access import connect
    from finetune_operator.cluster.api import Api
    from finetune_operator.cluster.as_user.jobs import Jobs
    from finetune_operator.cluster.as_user.problems import explained

    async with connect(context) as access:
        api = Api(access.client)
        with explained(api.server):
            yield Jobs(api, namespace or access.namespace)


def status_of(job: dict[str, Any]) -> JobStatus:
    """The status of a resource; empty before the first reconcile."""
    from finetune_api.status import JobStatus

    return JobStatus.parse(job.get("status"))


def not_served(job: dict[str, Any], now: datetime) -> str:
    """A sentence if no operator has reconciled the job within a while of its creation; else empty."""
    metadata = job["metadata"]
    age = now - datetime.fromisoformat(metadata["creationTimestamp"])
    if (job.get("status") or {}).get("conditions") or age < NOT_SERVED_AFTER:
        return ""
    return (
        f"No operator has picked up {metadata['name']} yet: "
        f"is finetune-operator running, and does it serve namespace {metadata['namespace']}?"
    )


def exit_code(status: JobStatus) -> int:
    """0 complete, 1 failed, 3 gate refused, 130 not ended."""
    from finetune_api.status import ConditionType

    if status.is_true(ConditionType.COMPLETE):
        return EXIT_COMPLETE
    failed = status.condition(ConditionType.FAILED)
    if failed is None or failed.status != "True":
        return EXIT_INTERRUPTED
    return EXIT_GATE_REFUSED if failed.reason == "GateRefused" else EXIT_FAILED


def ending(status: JobStatus) -> str:
    """What the end of a job says: the message of Complete or Failed."""
    from finetune_api.status import ConditionType
    from finetune_operator.view.words import printable

    kind = ConditionType.COMPLETE if status.is_true(ConditionType.COMPLETE) else ConditionType.FAILED
    condition = status.condition(kind)
    return printable(condition.message) if condition is not None else ""
