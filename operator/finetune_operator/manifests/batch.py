"""The stages that run in one pod each, as batch/v1 Jobs that retry nothing: the operator starts each attempt."""

from __future__ import annotations

from finetune_api.base import Stage
from finetune_api.rendezvous import Rendezvous
from finetune_api.runconfig import Attempt
from finetune_operator.manifests.job import Job, Manifest, attempt_metadata
from finetune_operator.manifests.pod import computing_resources, cpu_resources, pod_template

# They read what others have written: the limits keep it from taking the memory of a whole node.
_PREPARE_RESOURCES: Manifest = {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "32Gi"}}
_PUBLISH_RESOURCES: Manifest = {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "8Gi"}}


def prepare(job: Job, attempt: Attempt) -> Manifest:
    """Downloads, splits, tokenises. With a claim of its own it runs where Train will, so that the volume is there."""
    placed = job.spec.storage.run.claim_name is None
    return _job(
        job, attempt, pod_template(job, attempt, resources=cpu_resources(job, _PREPARE_RESOURCES), placed=placed)
    )


def evaluate(job: Job, attempt: Attempt) -> Manifest:
    """Measures the export on the GPUs of one node."""
    ranks = Rendezvous(ranks_per_node=job.ranks_per_node)
    template = pod_template(job, attempt, resources=computing_resources(job), placed=True, rendezvous=ranks)
    return _job(job, attempt, template, queued=job.gpus_per_node > 0)


def publish(job: Job, attempt: Attempt) -> Manifest:
    """Uploads the export."""
    return _job(
        job, attempt, pod_template(job, attempt, resources=cpu_resources(job, _PUBLISH_RESOURCES), placed=False)
    )


def batch_child(job: Job, attempt: Attempt) -> Manifest:
    """The Job of any stage but Train."""
    return {Stage.PREPARE: prepare, Stage.EVALUATE: evaluate, Stage.PUBLISH: publish}[attempt.stage](job, attempt)


def _job(job: Job, attempt: Attempt, template: Manifest, *, queued: bool = False) -> Manifest:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": attempt_metadata(job, attempt, queued=queued),
        # A failed pod is not replaced: the operator reads why it failed and starts the next attempt.
        "spec": {"backoffLimit": 0, "completions": 1, "parallelism": 1, "template": template},
    }
