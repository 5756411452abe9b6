"""What a `finetune run` works on: a new run, or the earlier one of the same name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.spec import FineTuneJob
from finetune_api.status import ConditionType, JobStatus
from finetune_operator.decision.model import RETRY_ANNOTATION
from finetune_operator.errors import UserError
from finetune_operator.local.jobfile import record as records
from finetune_operator.local.jobfile.changes import changed_fields, forbidden_changes, has_trained, refusal
from finetune_operator.local.jobfile.record import Record


def find_or_create(
    job: FineTuneJob, directory: Path, *, fresh: bool, retry: bool, tell: Callable[[str], None]
) -> Record:
    """The record of the run to resume or to start, not saved yet. The job's lock must be held.

    Raises UserError if the earlier run has a different spec in a field that may not change.
    """
    earlier = None if fresh else records.find(directory)
    if earlier is not None:
        earlier = _update(earlier, job, tell)
    record = earlier or records.create(directory, job)
    if retry:
        stamp = datetime.now(UTC).isoformat()
        annotations = {**record.job.metadata.annotations, RETRY_ANNOTATION: stamp}
        metadata = record.job.metadata.model_copy(update={"annotations": annotations})
        record.job = record.job.model_copy(update={"metadata": metadata})
    return record


def _update(earlier: Record, job: FineTuneJob, tell: Callable[[str], None]) -> Record | None:
    """The earlier run with the fields that may change brought up to date; None if a new one should start."""
    found = changed_fields(earlier.job.spec, job.spec)
    wrong = forbidden_changes(found, earlier.status)
    if wrong and failed(earlier.status) and not has_trained(earlier.status):
        named = ", ".join(change.path for change in wrong[:3])
        tell(f"The last run failed before training started, and {named} changed: starting a new run.")
        return None
    if wrong:
        raise UserError(refusal(job, wrong, earlier.status, str(earlier.run)))
    if found:
        metadata = earlier.job.metadata
        metadata = metadata.model_copy(update={"generation": metadata.generation + 1})
        earlier.job = earlier.job.model_copy(update={"spec": job.spec, "metadata": metadata})
    return earlier


def failed(status: JobStatus) -> bool:
    """Whether the job has failed for good."""
    return status.is_true(ConditionType.FAILED)


def complete(status: JobStatus) -> bool:
    """Whether the job is complete."""
    return status.is_true(ConditionType.COMPLETE)
