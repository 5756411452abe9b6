"""The child of any attempt, and everything that the operator would create for a job: what `finetune render` prints."""

from __future__ import annotations

from finetune_api.base import STAGES, Stage, duration_seconds
from finetune_api.runconfig import Attempt
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.batch import batch_child
from finetune_operator.manifests.job import Job, Manifest
from finetune_operator.manifests.shared import shared_manifests, stage_channel


def child_manifests(job: Job, attempt: Attempt, backend: Backend) -> list[Manifest]:
    """The object that runs one attempt comes last, after what it refers to."""
    if attempt.stage is Stage.TRAIN:
        return [*backend.before(job, attempt), backend.manifest(job, attempt)]
    return [batch_child(job, attempt)]


def all_manifests(job: Job, backend: Backend) -> list[Manifest]:
    """What the operator creates for a job whose stages all succeed at the first attempt."""
    wanted = [stage for stage in STAGES if stage is not Stage.PUBLISH or job.spec.publish is not None]
    stages = [[*stage_channel(job, s), *child_manifests(job, first_attempt(job, s), backend)] for s in wanted]
    return [*shared_manifests(job), *(manifest for made in stages for manifest in made)]


def first_attempt(job: Job, stage: Stage) -> Attempt:
    """Attempt 1 of a stage, before any plan."""
    return Attempt(
        uid=job.uid,
        stage=stage,
        grace_seconds=job.environment.grace_seconds,
        startup_seconds=duration_seconds(job.spec.timeouts.startup),
        hang_seconds=duration_seconds(job.spec.timeouts.hang),
        report_to="configmap",
    )
