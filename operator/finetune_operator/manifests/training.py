"""The pods of Train, the same for every backend."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.runconfig import Attempt
from finetune_operator.manifests.job import UID_LABEL, Job, Manifest
from finetune_operator.manifests.pod import computing_resources, pod_template


def training_template(job: Job, attempt: Attempt, container: str, rendezvous: Iterable[Manifest] = ()) -> Manifest:
    """A pod of the gang; its backend finds the container by the name `container`.

    Rendezvous is static: it waits for a node 0 that comes late, where c10d would give up after 60 s.
    """
    resources = computing_resources(job)
    template = pod_template(job, attempt, resources=resources, placed=True, container=container, variables=rendezvous)
    if job.spec.topology.nodes > 1:
        template["spec"]["affinity"] = _together(job)
    return template


def _together(job: Job) -> Manifest:
    """Near each other by preference: in one zone, where the network between them is fast."""
    term = {"topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": {UID_LABEL: job.uid}}}
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
