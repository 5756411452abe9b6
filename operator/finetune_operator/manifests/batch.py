"""The stages that run in one pod each, as batch/v1 Jobs without retries of their own: attempts are ours."""

from __future__ import annotations

from finetune_api.base import Stage
from finetune_api.runconfig import Attempt
from finetune_operator.manifests.job import Job, Manifest, attempt_metadata
from finetune_operator.manifests.pod import Program, gpu_resources, pod_template

CHECK_PUBLISH = Program("check-publish", ("check-publish",), "publish")
"""Before anything is downloaded: may the result be written where it shall go? Alone sees the write token."""
_PREPARE_RESOURCES: Manifest = {"requests": {"cpu": "1", "memory": "4Gi"}}
_PUBLISH_RESOURCES: Manifest = {"requests": {"cpu": "500m", "memory": "2Gi"}}
MASTER_PORT = 23456


def prepare(job: Job, attempt: Attempt) -> Manifest:
    """Downloads, splits, tokenises. With a claim of its own it goes where Train will go, so that the volume does."""
    template = pod_template(
        job,
        attempt,
        Program("prepare", ("prepare",), "hub"),
        before=[CHECK_PUBLISH] if job.spec.publish is not None else [],
        resources=_PREPARE_RESOURCES,
        placed=job.spec.storage.run.claim_name is None,
    )
    return _job(job, attempt, template)


def evaluate(job: Job, attempt: Attempt) -> Manifest:
    """Measures the export on the GPUs of one node."""
    template = pod_template(
        job,
        attempt,
        Program("evaluate", ("launch", "evaluate")),
        resources=gpu_resources(job),
        environment=_one_node(job, attempt),
        placed=True,
    )
    return _job(job, attempt, template, queued=job.gpus_per_node > 0)


def publish(job: Job, attempt: Attempt) -> Manifest:
    """Uploads the export."""
    program = Program("publish", ("publish",), "publish")
    return _job(job, attempt, pod_template(job, attempt, program, resources=_PUBLISH_RESOURCES, placed=False))


def batch_child(job: Job, attempt: Attempt) -> Manifest:
    """The Job of any stage but Train."""
    return {Stage.PREPARE: prepare, Stage.EVALUATE: evaluate, Stage.PUBLISH: publish}[attempt.stage](job, attempt)


def _one_node(job: Job, attempt: Attempt) -> list[Manifest]:
    values = {
        "PET_NNODES": "1",
        "PET_NODE_RANK": "0",
        "PET_NPROC_PER_NODE": str(job.ranks_per_node),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(MASTER_PORT),
        "PET_RDZV_CONF": f"timeout={attempt.startup_seconds}",
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _job(job: Job, attempt: Attempt, template: Manifest, *, queued: bool = False) -> Manifest:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": attempt_metadata(job, attempt, queued=queued),
        # A failed pod is not replaced: the operator reads why it failed and makes the next attempt.
        "spec": {"backoffLimit": 0, "completions": 1, "parallelism": 1, "template": template},
    }
