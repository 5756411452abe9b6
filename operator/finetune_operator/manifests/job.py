"""The job that every manifest is built from, and the metadata that all manifests carry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune_api.base import API_VERSION, KIND, Stage
from finetune_api.runconfig import Attempt, JobRef, Paths, RunConfig, resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.decision.model import Environment
from finetune_operator.manifests.labels import ATTEMPT, JOB, STAGE
from finetune_operator.manifests.names import child_name, label_value, shared_name

Manifest = dict[str, Any]

UID_LABEL = "finetune.dev/uid"
INSTANCE_LABEL = "app.kubernetes.io/instance"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGER = "finetune-operator"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

RUN_VOLUME = "/data"
CACHE_VOLUME = "/cache"


@dataclass(frozen=True)
class Job:
    """A FineTuneJob on a cluster, as the manifests need it."""

    namespace: str
    name: str
    uid: str
    spec: FineTuneJobSpec
    image: str
    environment: Environment = field(default_factory=Environment)

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a training pod."""
        given = self.spec.topology.gpus_per_node
        return self.environment.gpus_per_node if given is None else given

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a training pod: one per GPU, or one on the CPU."""
        return max(self.gpus_per_node, 1)

    @property
    def run_claim(self) -> str:
        """Name of the claim that holds the run directory."""
        return self.spec.storage.run.claim_name or shared_name(self.name, "run")

    @property
    def run_directory(self) -> str:
        """The job's directory on the volume of its run."""
        return f"{self.namespace}/{self.name}/{self.uid}"

    @property
    def config_name(self) -> str:
        """Name of the ConfigMap with the run config."""
        return shared_name(self.name, "config")

    def run_config(self) -> RunConfig:
        """The snapshot that determines what the trainer computes."""
        return RunConfig(
            job=JobRef(namespace=self.namespace, name=self.name, uid=self.uid),
            spec=resolve(self.spec),
            paths=Paths(run=f"{RUN_VOLUME}/{self.run_directory}", cache=CACHE_VOLUME, source=CACHE_VOLUME),
            image=self.image,
            operator_version=self.environment.operator_version,
        )


def labels(job: Job, stage: Stage | None = None, number: int | None = None) -> dict[str, str]:
    """Labels of an object of the job, by which it is watched and selected."""
    common = {
        "app.kubernetes.io/name": "finetune-trainer",
        INSTANCE_LABEL: label_value(job.name),
        MANAGED_BY_LABEL: MANAGER,
        JOB: label_value(job.name),
        UID_LABEL: job.uid,
    }
    if stage is None:
        return common
    return common | {"app.kubernetes.io/component": str(stage), STAGE: str(stage), ATTEMPT: str(number)}


def owned(job: Job) -> list[Manifest]:
    """The ownerReferences by which the garbage collector deletes what belongs to the job."""
    return [
        {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": job.name,
            "uid": job.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def metadata(job: Job, name: str, stage: Stage | None = None, number: int | None = None) -> Manifest:
    """Metadata of an object that the job owns."""
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": labels(job, stage, number),
        "ownerReferences": owned(job),
    }


def attempt_metadata(job: Job, attempt: Attempt, *, queued: bool = False) -> Manifest:
    """Metadata of the child of one attempt; `queued` if it requests GPUs, which a queue may admit."""
    made = metadata(job, child_name(job.name, attempt.stage, attempt.number), attempt.stage, attempt.number)
    if queued and job.spec.pod_template.queue_name:
        made["labels"] |= {QUEUE_LABEL: job.spec.pod_template.queue_name}
    return made
