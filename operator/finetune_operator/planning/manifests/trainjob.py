"""Kubeflow Trainer's TrainJob (v2, JobSet underneath) as a second carrier of training attempts."""

from __future__ import annotations

from typing import Any

from finetune_api.runconfig import Attempt
from finetune_operator.planning.manifests.backend import ChildState, condition_of, words
from finetune_operator.planning.manifests.batch import MASTER_PORT
from finetune_operator.planning.manifests.job import Job, Manifest, attempt_metadata
from finetune_operator.planning.manifests.pod import Program, gpu_resources, pod_template

RUNTIME = "torch-distributed"
"""The ClusterTrainingRuntime that Kubeflow Trainer installs for torchrun."""
REPLICATED_JOB = "node"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


class TrainJobBackend:
    """One TrainJob an attempt; pods are overridden from our own template, so that both carriers run the same pods."""

    api_version = "trainer.kubeflow.org/v1alpha1"
    kind = "TrainJob"
    plural = "trainjobs"

    def manifest(self, job: Job, attempt: Attempt) -> Manifest:
        """The gang of one attempt."""
        made = attempt_metadata(job, attempt, queued=job.gpus_per_node > 0)
        template = pod_template(
            job,
            attempt,
            Program("node", ("launch", "train"), "wandb"),
            resources=gpu_resources(job),
            environment=_rendezvous(made["name"], attempt),
            placed=True,
        )
        pod = template["spec"]
        container = pod["containers"][0]
        trainer = {
            "image": job.image,
            "command": container["command"],
            "env": container["env"],
            "numNodes": job.spec.topology.nodes,
            "numProcPerNode": job.ranks_per_node,
            "resourcesPerNode": container["resources"],
        }
        return {
            "apiVersion": self.api_version,
            "kind": self.kind,
            "metadata": made,
            "spec": {
                "runtimeRef": {"name": RUNTIME, "kind": "ClusterTrainingRuntime"},
                "trainer": trainer,
                "labels": template["metadata"]["labels"],
                "annotations": template["metadata"]["annotations"],
                "podTemplateOverrides": [_override(pod, container)],
            },
        }

    def state(self, child: dict[str, Any]) -> ChildState:
        """Success and failure as its conditions say; suspended by another means queued."""
        spec = child["spec"]
        complete, failed = condition_of(child, "Complete"), condition_of(child, "Failed")
        return ChildState(
            succeeded=complete is not None,
            failed=failed is not None,
            queued=bool(spec.get("suspend")),
            message=words(failed),
            pods_expected=spec["trainer"].get("numNodes", 1),
        )

    def pod_index(self, pod: dict[str, Any]) -> int:
        """The completion index of the replicated job, which is the node rank."""
        return int(pod["metadata"].get("labels", {}).get(INDEX_LABEL, "0"))


def _rendezvous(name: str, attempt: Attempt) -> list[Manifest]:
    rank = {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX_LABEL}']"}}
    return [
        {"name": "PET_NODE_RANK", "valueFrom": rank},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-{REPLICATED_JOB}-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(MASTER_PORT)},
        {"name": "PET_RDZV_CONF", "value": f"timeout={attempt.startup_seconds}"},
        {"name": "NCCL_DEBUG", "value": "WARN"},
    ]


def _override(pod: Manifest, container: Manifest) -> Manifest:
    """The parts of our pod that a TrainJob lets its author override."""
    kept = ("serviceAccountName", "nodeSelector", "tolerations", "volumes", "imagePullSecrets", "securityContext")
    spec = {name: pod[name] for name in kept if name in pod}
    spec["containers"] = [{"name": container["name"], "volumeMounts": container["volumeMounts"]}]
    return {"targetJobs": [{"name": REPLICATED_JOB}], "spec": spec}
