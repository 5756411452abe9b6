"""Kubeflow's PyTorchJob: worker-only, static rendezvous, no elastic policy, no retries of its own.

With `elasticPolicy` one succeeded worker would make the job Succeeded; a Master would bring an init container
without securityContext. Worker-only without it has neither, and needs all workers to succeed.
"""

from __future__ import annotations

from typing import Any

from finetune_api.rendezvous import DEFAULT_PORT, TORCHRUN
from finetune_api.runconfig import Attempt
from finetune_operator.manifests.backend import ObjectState, condition_of, describe
from finetune_operator.manifests.job import Job, Manifest, attempt_metadata
from finetune_operator.manifests.labels import REPLICA_INDEX
from finetune_operator.manifests.training import training_template


class PyTorchJobBackend:
    """One PyTorchJob per attempt."""

    api_version = "kubeflow.org/v1"
    kind = "PyTorchJob"
    plural = "pytorchjobs"
    provider = "the training-operator"
    container = "pytorch"
    owns_pods = "PyTorchJob"
    companions: tuple[str, ...] = ()

    def before(self, job: Job, attempt: Attempt) -> list[Manifest]:
        """Nothing: a PyTorchJob is complete in itself."""
        return []

    def manifest(self, job: Job, attempt: Attempt) -> Manifest:
        """The gang of one attempt: node ranks equal pod indices, and worker 0 is the rendezvous."""
        made = attempt_metadata(job, attempt, queued=job.gpus_per_node > 0)
        nodes = job.spec.topology.nodes
        template = training_template(job, attempt, self.container, _rendezvous(made["name"]))
        policy: Manifest = {"cleanPodPolicy": "None", "backoffLimit": 0}
        if job.environment.gang_scheduling:
            policy["schedulingPolicy"] = {"minAvailable": nodes}
        return {
            "apiVersion": self.api_version,
            "kind": self.kind,
            "metadata": made,
            "spec": {
                "nprocPerNode": str(job.ranks_per_node),
                "runPolicy": policy,
                "pytorchReplicaSpecs": {"Worker": {"replicas": nodes, "restartPolicy": "Never", "template": template}},
            },
        }

    def state(self, child: dict[str, Any]) -> ObjectState:
        """Success and failure from its conditions; suspended by another controller means queued."""
        spec = child["spec"]
        succeeded, failed = condition_of(child, "Succeeded"), condition_of(child, "Failed")
        return ObjectState(
            succeeded=succeeded is not None,
            failed=failed is not None,
            queued=bool(spec.get("runPolicy", {}).get("suspend")),
            message=describe(failed),
            pods_expected=spec["pytorchReplicaSpecs"]["Worker"].get("replicas", 1),
        )


def _rendezvous(name: str) -> list[Manifest]:
    """What the training-operator does not set: it sets PET_NNODES and PET_NPROC_PER_NODE."""
    rank = {"fieldRef": {"fieldPath": f"metadata.labels['{REPLICA_INDEX}']"}}
    return [
        {"name": TORCHRUN.node_rank, "valueFrom": rank},
        {"name": TORCHRUN.address[0], "value": f"{name}-worker-0"},
        {"name": TORCHRUN.port[0], "value": str(DEFAULT_PORT)},
    ]
