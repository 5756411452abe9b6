"""The pods of Train, the same whoever carries them."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.runconfig import Attempt
from finetune_operator.manifests.job import UID_LABEL, Job, Manifest
from finetune_operator.manifests.pod import Program, gpu_resources, pod_template


def training_template(job: Job, attempt: Attempt, container: str, rendezvous: Iterable[Manifest] = ()) -> Manifest:
    """A pod of the gang; `container` is the name by which its carrier finds it.

    Rendezvous is static: that bears a node 0 that comes late, where c10d would give up after 60 s.
    """
    shared = [
        {"name": "PET_RDZV_CONF", "value": f"timeout={attempt.startup_seconds}"},
        {"name": "NCCL_DEBUG", "value": "WARN"},
    ]
    template = pod_template(
        job,
        attempt,
        Program(container, ("launch", "train"), "wandb"),
        resources=gpu_resources(job),
        environment=[*rendezvous, *shared],
        placed=True,
    )
    if job.spec.topology.nodes > 1:
        template["spec"]["affinity"] = _together(job)
    return template


def _together(job: Job) -> Manifest:
    """Near each other by preference: in one zone, where the network between them is fast."""
    term = {
        "topologyKey": "topology.kubernetes.io/zone",
        "labelSelector": {"matchLabels": {UID_LABEL: job.uid}},
    }
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
