"""Kubeflow Trainer's TrainJob (v2, JobSet underneath): a TrainingRuntime with our pods, and a TrainJob that runs it.

A TrainJob can patch only some fields of a runtime's pods, different ones in each version, and neither the containers'
securityContext nor the grace period. So each attempt brings a runtime of its own that contains the whole pod.
"""

from __future__ import annotations

from typing import Any

from finetune_api.runconfig import Attempt
from finetune_operator.manifests.backend import ObjectState, condition_of, describe
from finetune_operator.manifests.job import Job, Manifest, attempt_metadata
from finetune_operator.manifests.training import training_template

REPLICATED_JOB = "node"
"""Where Kubeflow Trainer looks for the container that gets its `PET_*` variables."""
ANCESTOR = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


class TrainJobBackend:
    """One TrainJob per attempt, and its runtime of the same name."""

    api_version = "trainer.kubeflow.org/v1alpha1"
    kind = "TrainJob"
    plural = "trainjobs"
    provider = "Kubeflow Trainer"
    container = "node"
    owns_pods = "Job"
    companions: tuple[str, ...] = ("TrainingRuntime",)

    def before(self, job: Job, attempt: Attempt) -> list[Manifest]:
        """The runtime: one Indexed Job whose pods are ours."""
        spec: Manifest = {
            "mlPolicy": {"numNodes": job.spec.topology.nodes, "torch": {}},
            "template": {
                "spec": {
                    # The other ranks look up rank 0 before it is ready.
                    "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                    "failurePolicy": {"maxRestarts": 0},
                    "replicatedJobs": [_replicated_job(job, attempt)],
                }
            },
        }
        if job.environment.gang_scheduling:
            spec["podGroupPolicy"] = {"coscheduling": {"scheduleTimeoutSeconds": attempt.startup_seconds}}
        metadata = attempt_metadata(job, attempt)
        return [{"apiVersion": self.api_version, "kind": "TrainingRuntime", "metadata": metadata, "spec": spec}]

    def manifest(self, job: Job, attempt: Attempt) -> Manifest:
        """The gang of one attempt: node ranks equal completion indices; Kubeflow Trainer sets the `PET_*` variables."""
        made = attempt_metadata(job, attempt, queued=job.gpus_per_node > 0)
        return {
            "apiVersion": self.api_version,
            "kind": self.kind,
            "metadata": made,
            "spec": {
                "runtimeRef": {"name": made["name"], "kind": "TrainingRuntime"},
                "trainer": {"numNodes": job.spec.topology.nodes, "numProcPerNode": job.ranks_per_node},
            },
        }

    def state(self, child: dict[str, Any]) -> ObjectState:
        """Success and failure from its conditions; suspended by another controller means queued."""
        spec = child["spec"]
        complete, failed = condition_of(child, "Complete"), condition_of(child, "Failed")
        return ObjectState(
            succeeded=complete is not None,
            failed=failed is not None,
            queued=bool(spec.get("suspend")),
            message=describe(failed),
            pods_expected=spec["trainer"].get("numNodes", 1),
        )


def _replicated_job(job: Job, attempt: Attempt) -> Manifest:
    nodes = job.spec.topology.nodes
    return {
        "name": REPLICATED_JOB,
        "replicas": 1,
        "template": {
            "metadata": {"labels": ANCESTOR},
            "spec": {
                "completionMode": "Indexed",
                "completions": nodes,
                "parallelism": nodes,
                # A failed pod is not replaced, and the others stay until they have reported: with a limit for all
                # pods, the Job would delete them, and with them the root cause.
                "backoffLimitPerIndex": 0,
                "podReplacementPolicy": "Failed",
                "template": training_template(job, attempt, TrainJobBackend.container),
            },
        },
    }
