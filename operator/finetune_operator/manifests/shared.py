"""What all stages of a job share: run config, report, the pods' rights, the run's claim, the network policy."""

from __future__ import annotations

import json

from finetune_api.runconfig import RUN_CONFIG_FILE, resolve
from finetune_operator.manifests.job import INSTANCE_LABEL, UID_LABEL, Job, Manifest, labels, metadata


def shared_manifests(job: Job) -> list[Manifest]:
    """Every shared object, in the order of creation."""
    claim = [run_claim(job)] if job.spec.storage.run.claim_name is None else []
    return [*claim, run_config(job), report(job), service_account(job), role(job), role_binding(job), isolation(job)]


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


def report(job: Job) -> Manifest:
    """The ConfigMap that the pods write their reports to: one key per stage."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(job, job.report_name)}


def service_account(job: Job) -> Manifest:
    """The identity of the pods; its token is mounted only where a pod reports."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(job, job.account_name),
        "automountServiceAccountToken": False,
    }


def role(job: Job) -> Manifest:
    """The pods may patch the job's report and nothing else."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": metadata(job, job.account_name),
        "rules": [
            {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [job.report_name], "verbs": ["patch"]}
        ],
    }


def role_binding(job: Job) -> Manifest:
    """Binds the role to the pods' ServiceAccount."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": metadata(job, job.account_name),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": job.account_name},
        "subjects": [{"kind": "ServiceAccount", "name": job.account_name, "namespace": job.namespace}],
    }


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
        "spec": {
            "accessModes": [run.access_mode],
            "resources": {"requests": {"storage": run.size}},
            **storage,
        },
    }


def isolation(job: Job) -> Manifest:
    """Only pods of the same job may reach its pods: NCCL, gloo and the store authenticate no one."""
    pods = {"matchLabels": {UID_LABEL: labels(job)[UID_LABEL]}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job, job.account_name),
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": pods}]}],
        },
    }
