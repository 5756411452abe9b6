"""Which fields of a job may change once it has started, and the error for those that may not. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.base import Stage
from finetune_api.spec import MUTABILITY, FineTuneJob, FineTuneJobSpec, Mutability
from finetune_api.status import ConditionType, JobStatus
from finetune_api.structure import leaves

MUTABLE = tuple(name for name, when in MUTABILITY.items() if when is Mutability.ALWAYS)
"""May change at any time."""
MUTABLE_WHILE_STOPPED = tuple(name for name, when in MUTABILITY.items() if when is Mutability.SUSPENDED)
"""May change while nothing runs; on a cluster that is `suspend: true`, here whenever the job is not finished."""

ABSENT = "nothing"


@dataclass(frozen=True)
class Change:
    """One field whose value differs."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path} ({_short(self.before)} → {_short(self.after)})"


def changed_fields(before: FineTuneJobSpec, after: FineTuneJobSpec) -> list[Change]:
    """The fields that differ, defaults filled in on both sides; datasets by their name."""
    old, new = _fields(before), _fields(after)
    paths = [*old, *(path for path in new if path not in old)]
    return [
        Change(path, old.get(path, ABSENT), new.get(path, ABSENT)) for path in paths if old.get(path) != new.get(path)
    ]


def forbidden_changes(found: list[Change], status: JobStatus) -> list[Change]:
    """The changes that a job in this state does not allow."""
    finished = status.is_true(ConditionType.COMPLETE) or status.is_true(ConditionType.FAILED)
    free = MUTABLE if finished else MUTABLE + MUTABLE_WHILE_STOPPED
    return [change for change in found if not any(f"{change.path}.".startswith(f"{prefix}.") for prefix in free)]


def has_trained(status: JobStatus) -> bool:
    """Whether any training was started, whose results a new run would lose."""
    return status.attempts_started.get(Stage.TRAIN, 0) > 0


def refusal(job: FineTuneJob, found: list[Change], status: JobStatus, run: str) -> str:
    """The error for a job that was started with a different spec."""
    named = ", ".join(str(change) for change in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    done = status.is_true(ConditionType.COMPLETE) or status.is_true(ConditionType.FAILED)
    state = "has finished" if done else "has already started"
    return (
        f"{job.metadata.name} {state} with a different spec: {named}{more} changed. Undo the change to resume, give "
        f"the job a different metadata.name, or add --fresh to start over (what was done stays in {run})."
    )


def _fields(spec: FineTuneJobSpec) -> dict[str, Any]:
    return dict(leaves({**spec.to_wire(), "datasets": {dataset.name: dataset.to_wire() for dataset in spec.datasets}}))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
