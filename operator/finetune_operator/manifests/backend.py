"""What carries a gang of training pods: a PyTorchJob or a TrainJob. Made and read, never changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.runconfig import Attempt
from finetune_operator.manifests.job import Job, Manifest


@dataclass(frozen=True)
class ChildState:
    """What the object that carries an attempt says of itself."""

    succeeded: bool = False
    failed: bool = False
    queued: bool = False
    message: str = ""
    pods_expected: int = 1


class Backend(Protocol):
    """Makes the child of one training attempt and reads its state."""

    api_version: str
    kind: str
    plural: str
    provider: str
    """Who has to be installed for these objects to be known and worked on."""
    owns_pods: str
    """Kind of the object that the pods belong to: the child itself, or what its controller makes of it."""
    companions: tuple[str, ...]
    """Kinds of what is made before the child, under its name, and deleted after it."""

    def before(self, job: Job, attempt: Attempt) -> list[Manifest]:
        """What the child of one attempt refers to."""
        ...

    def manifest(self, job: Job, attempt: Attempt) -> Manifest:
        """The child of one attempt."""
        ...

    def state(self, child: dict[str, Any]) -> ChildState:
        """What a child's spec and status say."""
        ...


def condition_of(child: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The condition of a type, if it is True."""
    conditions = (child.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == kind and c.get("status") == "True"), None)


def words(condition: dict[str, Any] | None) -> str:
    """Reason and message of a condition in a sentence."""
    if condition is None:
        return ""
    return ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)
