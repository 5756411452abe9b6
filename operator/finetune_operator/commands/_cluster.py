"""What the commands on a cluster share: their options, and the way to a namespace's jobs. Imports no client."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_operator.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_GATE_REFUSED, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from finetune_api.status import JobStatus
    from finetune_operator.cluster.as_user.jobs import Jobs

UNTOUCHED_AFTER = timedelta(seconds=20)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the job.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="NAMESPACE", help="Where; else the kubeconfig's namespace.")
]
Context = Annotated[
    str | None, typer.Option("--context", metavar="CONTEXT", help="Context of the kubeconfig; else the current one.")
]


def jobs_in(namespace: str | None, context: str | None) -> Jobs:
    """The jobs of the namespace that was named, or of the kubeconfig's."""
    from finetune_operator.cluster.as_user.connection import connect
    from finetune_operator.cluster.as_user.jobs import Jobs

    connection = connect(context, namespace)
    return Jobs(connection, connection.namespace)


def status_of(job: dict[str, Any]) -> JobStatus:
    """The status of a resource; of one that nobody has touched yet, an empty one."""
    from finetune_api.status import JobStatus

    return JobStatus.parse(job.get("status"))


def nobody_looks(job: dict[str, Any], now: datetime) -> str:
    """A sentence if no operator has touched the job for a while after its creation; else empty."""
    metadata = job["metadata"]
    age = now - datetime.fromisoformat(metadata["creationTimestamp"])
    if (job.get("status") or {}).get("conditions") or age < UNTOUCHED_AFTER:
        return ""
    return (
        f"No operator has looked at {metadata['name']} yet: "
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

    kind = ConditionType.COMPLETE if status.is_true(ConditionType.COMPLETE) else ConditionType.FAILED
    condition = status.condition(kind)
    return condition.message if condition is not None else ""
