"""The pods of every stage: restricted, without rights, tokens only where they are needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from finetune_api.base import STAGES, Stage
from finetune_api.rendezvous import Rendezvous
from finetune_api.runconfig import REPORT_VARIABLE, RESUME_VARIABLE, RUN_CONFIG_FILE, TOKENS_VARIABLE, Attempt
from finetune_operator.manifests.job import CACHE_VOLUME, RUN_VOLUME, Job, Manifest, labels
from finetune_operator.manifests.names import channel_name
from finetune_operator.programs import (
    CHECK_PUBLISH,
    COMPUTING_STAGES,
    Program,
    programs_of,
    secret_of,
    trainer_environment,
)

CONFIG_DIRECTORY = "/etc/finetune"
TOKENS_DIRECTORY = "/var/run/secrets/finetune"
REPORT_TOKEN_DIRECTORY = "/var/run/secrets/finetune-report"
REPORT_TOKEN_SECONDS = 3600
RESUME_DIRECTORY = "/resume"
"""Where the claim of `training.resumeFrom`, or the run's own, is mounted as a whole."""
PRODUCTS = ("prepared", "export", "evaluation")
"""What Prepare, Train and Evaluate leave in the run directory."""
USER = 1000
"""User and group of the trainer image."""
NODE_LOSS_SECONDS = 120
"""How long a node may be not ready or unreachable before its pods are given up: docs/decisions/0018."""


def pod_template(
    job: Job,
    attempt: Attempt,
    *,
    resources: Manifest,
    placed: bool,
    container: str | None = None,
    rendezvous: Rendezvous | None = None,
    variables: Iterable[Manifest] = (),
) -> Manifest:
    """The pod of one attempt: what `programs` says that its stage runs.

    `placed`: it carries the user's node selector. `container`: the name of the stage's own container,
    where somebody else looks for it. `variables`: further ones, for a rendezvous that depends on the pod.
    """
    *before, program = programs_of(attempt.stage, job.spec)
    named = replace(program, name=container or program.name)
    environment = _environment(job, attempt, rendezvous)
    template, small = job.spec.pod_template, cpu_resources(job, _SMALL)
    spec: Manifest = {
        "serviceAccountName": channel_name(job.name, attempt.stage),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": attempt.grace_seconds,
        "securityContext": _pod_security(),
        "initContainers": [
            _container(job, attempt, each, environment, small if each is CHECK_PUBLISH else resources)
            for each in before
        ],
        "containers": [_container(job, attempt, named, environment, resources, variables)],
        "tolerations": [*_own_tolerations(), *(each.to_wire() for each in job.spec.pod_template.tolerations)],
        "volumes": _volumes(job, attempt, [*before, program]),
    }
    if placed and template.node_selector:
        spec["nodeSelector"] = dict(template.node_selector)
    if template.priority_class_name:
        spec["priorityClassName"] = template.priority_class_name
    if job.spec.image_pull_secrets:
        spec["imagePullSecrets"] = [secret.to_wire() for secret in job.spec.image_pull_secrets]
    if not spec["initContainers"]:
        del spec["initContainers"]
    own = labels(job, attempt.stage, attempt.number)
    return {
        "metadata": {"labels": dict(template.labels) | own, "annotations": dict(template.annotations)},
        "spec": spec,
    }


_SMALL: Manifest = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}
_TEMPORARY_SIZE = "20Gi"
"""Of `/tmp`: caches of compilers and clients, and code that a model brings along."""
_SHARED_MEMORY_SIZE = "16Gi"
"""It counts towards the memory of the pod."""


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container(
    job: Job,
    attempt: Attempt,
    program: Program,
    environment: Mapping[str, str],
    resources: Manifest,
    variables: Iterable[Manifest] = (),
) -> Manifest:
    return {
        "name": program.name,
        "image": job.image,
        "command": program.command(),
        "env": [
            *({"name": name, "value": value} for name, value in {**environment, **program.variables}.items()),
            *variables,
        ],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(job, attempt.stage, program),
    }


def _environment(job: Job, attempt: Attempt, rendezvous: Rendezvous | None) -> dict[str, str]:
    """The variables of every container of a pod."""
    resumes = _resume_volume(job, attempt.stage) is not None
    common = trainer_environment(
        attempt,
        given={variable.name: variable.value for variable in job.spec.pod_template.env},
        config_file=f"{CONFIG_DIRECTORY}/{RUN_CONFIG_FILE}",
        # Only Prepare may write to the cache.
        hf_home=f"{CACHE_VOLUME}/huggingface" if attempt.stage is Stage.PREPARE else "/tmp/huggingface",
        gpus=job.gpus_per_node,
        threads=_threads(job) if attempt.stage in COMPUTING_STAGES else None,
        rendezvous=rendezvous,
    )
    return common | {
        "HOME": "/tmp",
        "USER": "trainer",
        # Imported from: another job's code must not lie there.
        "HF_MODULES_CACHE": "/tmp/modules",
        TOKENS_VARIABLE: TOKENS_DIRECTORY,
        REPORT_VARIABLE: f"{job.namespace}/{channel_name(job.name, attempt.stage)}",
        **({RESUME_VARIABLE: RESUME_DIRECTORY} if resumes else {}),
    }


def _threads(job: Job) -> int | None:
    """Threads per rank within the pod's CPU limit, or its request; None if it has neither.

    Without a number, each rank would start as many threads as its node has cores.
    """
    resources = job.spec.pod_template.resources
    cpu = re.fullmatch(r"([0-9.]+)(m?)", resources.limits.get("cpu") or resources.requests.get("cpu") or "")
    if cpu is None:
        return None
    cores = float(cpu[1]) / (1000 if cpu[2] else 1)
    return max(1, int(cores / job.ranks_per_node))


def _resume_claim(job: Job, stage: Stage) -> str | None:
    """The claim with another job's checkpoint that Train starts from, if it is not on the run's own."""
    resume_from = job.spec.training.resume_from
    return resume_from.claim if resume_from is not None and stage is Stage.TRAIN else None


def _resume_volume(job: Job, stage: Stage) -> str | None:
    """The volume with the checkpoint that Train starts from, if it starts from one."""
    if job.spec.training.resume_from is None or stage is not Stage.TRAIN:
        return None
    return "run" if _resume_claim(job, stage) is None else "resume"


def _run_mounts(job: Job, stage: Stage) -> list[Manifest]:
    """The job's own directory, since jobs can share a claim, and over it, read-only, what earlier stages left there."""
    own = job.run_directory
    earlier = [f"{own}/{product}" for product in PRODUCTS[: STAGES.index(stage)]]
    return [
        {"name": "run", "mountPath": f"{RUN_VOLUME}/{own}", "subPath": own},
        *({"name": "run", "mountPath": f"{RUN_VOLUME}/{at}", "subPath": at, "readOnly": True} for at in earlier),
    ]


def _mounts(job: Job, stage: Stage, program: Program) -> list[Manifest]:
    mounts: list[Manifest] = [
        *_run_mounts(job, stage),
        {"name": "cache", "mountPath": CACHE_VOLUME, "readOnly": stage is not Stage.PREPARE},
        {"name": "config", "mountPath": CONFIG_DIRECTORY, "readOnly": True},
        {"name": "report-token", "mountPath": REPORT_TOKEN_DIRECTORY, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if stage in COMPUTING_STAGES:
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    resume = _resume_volume(job, stage)
    if resume is not None:
        mounts.append({"name": resume, "mountPath": RESUME_DIRECTORY, "readOnly": True})
    if secret_of(job.spec.credentials, program.token) is not None:
        mounts.append({"name": f"token-{program.token}", "mountPath": TOKENS_DIRECTORY, "readOnly": True})
    return mounts


def _volumes(job: Job, attempt: Attempt, programs: list[Program]) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "run", "persistentVolumeClaim": {"claimName": job.run_claim}},
        {"name": "cache", "persistentVolumeClaim": {"claimName": job.spec.storage.cache.claim_name}},
        {"name": "config", "configMap": {"name": job.config_name}},
        {"name": "report-token", "projected": {"sources": _report_token(), "defaultMode": 0o440}},
        {"name": "tmp", "emptyDir": {"sizeLimit": _TEMPORARY_SIZE}},
    ]
    if attempt.stage in COMPUTING_STAGES:
        # The default 64 MiB of /dev/shm are too few for NCCL.
        memory = {"medium": "Memory", "sizeLimit": _SHARED_MEMORY_SIZE}
        volumes.append({"name": "shared-memory", "emptyDir": memory})
    resume_claim = _resume_claim(job, attempt.stage)
    if resume_claim is not None:
        # Read-only by the mount: a claim that is read-only as a whole could not be the run's own as well.
        volumes.append({"name": "resume", "persistentVolumeClaim": {"claimName": resume_claim}})
    for kind in dict.fromkeys(program.token for program in programs):
        named = secret_of(job.spec.credentials, kind)
        if named is not None:
            _, secret = named
            items = [{"key": secret.key, "path": str(kind)}]
            source = {"secretName": secret.name, "items": items, "defaultMode": 0o440}
            volumes.append({"name": f"token-{kind}", "secret": source})
    return volumes


def _report_token() -> list[Manifest]:
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": REPORT_TOKEN_SECONDS}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
    ]


def _own_tolerations() -> list[Manifest]:
    return [
        {
            "key": f"node.kubernetes.io/{taint}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": NODE_LOSS_SECONDS,
        }
        for taint in ("not-ready", "unreachable")
    ]


def computing_resources(job: Job) -> Manifest:
    """Resources of a pod that computes: the user's, and the GPUs of the topology."""
    given = job.spec.pod_template.resources
    resources: Manifest = {"requests": dict(given.requests), "limits": dict(given.limits)}
    if job.gpus_per_node:
        resources["limits"] |= {"nvidia.com/gpu": str(job.gpus_per_node)}
    return {name: values for name, values in resources.items() if values}


def cpu_resources(job: Job, default: Manifest) -> Manifest:
    """Resources of a container that uses no GPU: the user's, and the default ones that do not contradict them."""
    given = job.spec.pod_template.cpu_resources
    # Kubernetes requests what is limited where nothing is requested, and allows no limit below a request.
    requests = {name: value for name, value in default["requests"].items() if name not in given.limits}
    limits = {name: given.requests.get(name, value) for name, value in default["limits"].items()}
    return {"requests": requests | given.requests, "limits": limits | given.limits}
