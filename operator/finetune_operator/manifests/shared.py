"""What the pods of a job need: run config, the run's claim, the network policy, and each stage's report channel."""

from __future__ import annotations

import json

from finetune_api.base import Stage
from finetune_api.runconfig import RUN_CONFIG_FILE, resolve
from finetune_operator.manifests.job import INSTANCE_LABEL, UID_LABEL, Job, Manifest, labels, metadata
from finetune_operator.manifests.names import channel_name, shared_name


def shared_manifests(job: Job) -> list[Manifest]:
    """What all stages share, in the order of creation: the presence of the run config means that all exist."""
    claim = [run_claim(job)] if job.spec.storage.run.claim_name is None else []
    return [*claim, isolation(job), run_config(job)]


def run_config(job: Job) -> Manifest:
    """The immutable snapshot that the trainer reads."""
    text = json.dumps(job.run_config().to_wire(), indent=1, ensure_ascii=False)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, job.config_name),
        "immutable": True,
        "data": {RUN_CONFIG_FILE: text},
    }


def stage_channel(job: Job, stage: Stage) -> list[Manifest]:
    """How the pods of one stage report: an account that may patch one ConfigMap and nothing else.

    The ConfigMap comes last, so that its presence means that all exist.
    """
    name = channel_name(job.name, stage)
    meta = metadata(job, name)
    rbac = "rbac.authorization.k8s.io"
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [name], "verbs": ["patch"]}
    return [
        # Its token is mounted only where a pod reports.
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta, "automountServiceAccountToken": False},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": meta, "rules": [rule]},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": job.namespace}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta},
    ]


def run_claim(job: Job) -> Manifest:
    """The claim of the run directory. One that is kept has no owner, so that it is not garbage-collected."""
    run = resolve(job.spec).storage.run
    made = metadata(job, job.run_claim)
    if run.keep:
        del made["ownerReferences"]
        # By this label Argo CD would take the claim for its own, and prune it with the job.
        del made["labels"][INSTANCE_LABEL]
    storage = {} if run.storage_class_name is None else {"storageClassName": run.storage_class_name}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": made,
        "spec": {"accessModes": [run.access_mode], "resources": {"requests": {"storage": run.size}}, **storage},
    }


def isolation(job: Job) -> Manifest:
    """Only pods of the same job may reach its pods: NCCL, gloo and the store authenticate no one."""
    pods = {"matchLabels": {UID_LABEL: labels(job)[UID_LABEL]}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job, shared_name(job.name, "trainer")),
        "spec": {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": pods}]}]},
    }
