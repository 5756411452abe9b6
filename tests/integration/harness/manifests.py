"""Small objects for tests of the harness itself: only what a test is about is spelled out."""

from __future__ import annotations

from .api import Resource

IMAGE = "registry.invalid/trainer:test"


def worker_only_pytorchjob(name: str, workers: int) -> Resource:
    """Return a PyTorchJob in the shape that training attempts have: no Master, no elastic policy."""
    container = {
        **restricted_container("pytorch"),
        "env": [
            {
                "name": "PET_NODE_RANK",
                "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}},
            },
            {"name": "PET_MASTER_ADDR", "value": f"{name}-worker-0"},
            {"name": "PET_MASTER_PORT", "value": "23456"},
        ],
    }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {
            "nprocPerNode": "4",
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": 0},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": workers,
                    "restartPolicy": "Never",
                    "template": {"spec": restricted_pod(container)},
                }
            },
        },
    }


def batch_job(name: str) -> Resource:
    """Return a batch Job of one pod that is not retried."""
    template = {"spec": {**restricted_pod(restricted_container("main")), "restartPolicy": "Never"}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": template},
    }


def claim(name: str, size: str = "1Gi") -> Resource:
    """Return a claim without a storage class, which waits for a volume made by hand."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "resources": {"requests": {"storage": size}},
        },
    }


def config_map(name: str, owner: Resource | None = None) -> Resource:
    """Return a ConfigMap, owned by another object where one is given."""
    metadata: Resource = {"name": name}
    if owner is not None:
        metadata["ownerReferences"] = [owner_reference(owner)]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def owner_reference(owner: Resource) -> Resource:
    """Return the reference by which an object is owned and garbage-collected."""
    metadata = owner["metadata"]
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def restricted_pod(container: Resource) -> Resource:
    """Return a pod spec that passes the `restricted` Pod Security Standard."""
    return {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }


def restricted_container(name: str) -> Resource:
    """Return a container that passes the `restricted` Pod Security Standard."""
    return {
        "name": name,
        "image": IMAGE,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
