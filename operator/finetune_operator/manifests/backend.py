"""The objects that run a gang of training pods: PyTorchJob or TrainJob. Created and read, never updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.runconfig import Attempt
from finetune_operator.manifests.job import Job, Manifest


@dataclass(frozen=True)
class ObjectState:
    """The state of the object that runs an attempt."""

    succeeded: bool = False
    failed: bool = False
    queued: bool = False
    message: str = ""
    pods_expected: int = 1


class Backend(Protocol):
    """Builds the child of one training attempt and reads its state."""

    api_version: str
    kind: str
    plural: str
    provider: str
    """What must be installed on the cluster to serve and reconcile these objects."""
    container: str
    """The name by which its controller finds the container of a rank's launcher."""
    owns_pods: str
    """Kind of the object that owns the pods: the child itself, or one that its controller creates."""
    companions: tuple[str, ...]
    """Kinds of the objects that are created before the child, under its name, and deleted after it."""

    def before(self, job: Job, attempt: Attempt) -> list[Manifest]:
        """The objects that the child of one attempt refers to."""
        ...

    def manifest(self, job: Job, attempt: Attempt) -> Manifest:
        """The child of one attempt."""
        ...

    def state(self, child: dict[str, Any]) -> ObjectState:
        """The state in a child's spec and status."""
        ...


def condition_of(child: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The condition of a type, if it is True."""
    conditions = (child.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == kind and c.get("status") == "True"), None)


def describe(condition: dict[str, Any] | None) -> str:
    """Reason and message of a condition in one line; empty for None."""
    if condition is None:
        return ""
    return ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)
