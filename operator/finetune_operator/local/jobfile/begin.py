"""Where a `finetune run` begins: a new run, or the one that was begun under this name before."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.spec import FineTuneJob
from finetune_api.status import ConditionType, JobStatus
from finetune_operator.decision.model import RETRY_ANNOTATION
from finetune_operator.errors import UserError
from finetune_operator.local.jobfile import record as records
from finetune_operator.local.jobfile.changes import begun_training, changes, forbidden, refusal
from finetune_operator.local.jobfile.record import Record


def begin(job: FineTuneJob, directory: Path, *, fresh: bool, retry: bool, tell: Callable[[str], None]) -> Record:
    """The record to go on with, not saved yet. The job's lock must be held.

    Raises UserError if the job was begun with another spec in a field that may not change.
    """
    earlier = None if fresh else records.find(directory)
    if earlier is not None:
        earlier = _go_on(earlier, job, tell)
    record = earlier or records.create(directory, job)
    if retry:
        stamp = datetime.now(UTC).isoformat()
        annotations = {**record.job.metadata.annotations, RETRY_ANNOTATION: stamp}
        metadata = record.job.metadata.model_copy(update={"annotations": annotations})
        record.job = record.job.model_copy(update={"metadata": metadata})
    return record


def _go_on(earlier: Record, job: FineTuneJob, tell: Callable[[str], None]) -> Record | None:
    """The earlier run with what may change brought up to date; None where a new one should begin."""
    found = changes(earlier.job.spec, job.spec)
    wrong = forbidden(found, earlier.status)
    if wrong and failed(earlier.status) and not begun_training(earlier.status):
        named = ", ".join(change.path for change in wrong[:3])
        tell(f"The last run failed before any training; with {named} changed, this is a new one.")
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
