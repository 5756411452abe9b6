"""The pods of every stage: restricted, without rights, tokens only where they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from finetune_api.base import Stage
from finetune_api.runconfig import ATTEMPT_VARIABLE, GPUS_VARIABLE, RUN_CONFIG_FILE, Attempt
from finetune_api.spec import SecretKey
from finetune_operator.manifests.job import CACHE_VOLUME, RUN_VOLUME, Job, Manifest, labels

TokenKind = Literal["hub", "publish", "wandb"]

CONFIG_DIRECTORY = "/etc/finetune"
TOKENS_DIRECTORY = "/var/run/secrets/finetune"
REPORT_TOKEN_DIRECTORY = "/var/run/secrets/finetune-report"
REPORT_TOKEN_SECONDS = 3600
RESUME_DIRECTORY = "/resume"
"""Where the claim of `training.resumeFrom` is mounted."""
USER = 1000
"""User and group of the trainer image."""
NODE_LOSS_SECONDS = 120
"""How long a node may be not ready or unreachable before its pods are given up: docs/decisions/0018."""


@dataclass(frozen=True)
class Program:
    """One container: what it runs, and which token it alone sees."""

    name: str
    arguments: tuple[str, ...]
    token: TokenKind | None = None


def token_secret(job: Job, kind: TokenKind | None) -> SecretKey | None:
    """The Secret behind a kind of token; publishing falls back to the read token."""
    credentials = job.spec.credentials
    if kind == "publish":
        return credentials.publish or credentials.hub
    return {"hub": credentials.hub, "wandb": credentials.wandb}[kind] if kind is not None else None


def pod_template(
    job: Job,
    attempt: Attempt,
    program: Program,
    *,
    before: Iterable[Program] = (),
    resources: Manifest,
    environment: Iterable[Manifest] = (),
    placed: bool,
) -> Manifest:
    """The pod of one attempt. `placed`: it carries the user's node selector; tolerations come along."""
    extra = list(environment)
    template = job.spec.pod_template
    spec: Manifest = {
        "serviceAccountName": job.account_name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": attempt.grace_seconds,
        "securityContext": _pod_security(),
        "initContainers": [_container(job, attempt, each, extra, _SMALL) for each in before],
        "containers": [_container(job, attempt, program, extra, resources)],
        "tolerations": [*_own_tolerations(), *(_tolerations(job) if placed else [])],
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


_SMALL: Manifest = {"requests": {"cpu": "100m", "memory": "512Mi"}}


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container(job: Job, attempt: Attempt, program: Program, extra: list[Manifest], resources: Manifest) -> Manifest:
    return {
        "name": program.name,
        "image": job.image,
        "command": ["python", "-m", "finetune_trainer", *program.arguments],
        "env": [*_environment(job, attempt), *extra],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(job, attempt.stage, program),
    }


def _environment(job: Job, attempt: Attempt) -> list[Manifest]:
    """Variables of every container; the user's own come first, so that ours win."""
    prepares, resume_from = attempt.stage is Stage.PREPARE, job.spec.training.resume_from
    values = {
        "HOME": "/tmp",
        "USER": "trainer",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Outside Prepare the cache is read-only, and nothing is fetched that Prepare has not fetched.
        "HF_HOME": f"{CACHE_VOLUME}/huggingface" if prepares else "/tmp/huggingface",
        **({"HF_HUB_OFFLINE": "1"} if attempt.stage in (Stage.TRAIN, Stage.EVALUATE) else {}),
        **({"FINETUNE_RESUME_FROM": _resume_mount(job)} if resume_from and attempt.stage is Stage.TRAIN else {}),
        "FINETUNE_RUN_CONFIG": f"{CONFIG_DIRECTORY}/{RUN_CONFIG_FILE}",
        "FINETUNE_TOKENS": TOKENS_DIRECTORY,
        "FINETUNE_REPORT_CONFIGMAP": f"{job.namespace}/{job.report_name}",
        ATTEMPT_VARIABLE: attempt.model_dump_json(by_alias=True, exclude_none=True),
        **({GPUS_VARIABLE: str(job.gpus_per_node)} if attempt.stage in (Stage.TRAIN, Stage.EVALUATE) else {}),
    }
    given = [{"name": v.name, "value": v.value} for v in job.spec.pod_template.env if v.name not in values]
    return [*given, *({"name": name, "value": value} for name, value in values.items())]


def _resume_claim(job: Job, stage: Stage) -> str | None:
    """The claim with another job's checkpoint that Train starts from, if it is not on the run's own."""
    resume_from = job.spec.training.resume_from
    return resume_from.claim if resume_from is not None and stage is Stage.TRAIN else None


def _resume_mount(job: Job) -> str:
    return RESUME_DIRECTORY if _resume_claim(job, Stage.TRAIN) is not None else RUN_VOLUME


def _mounts(job: Job, stage: Stage, program: Program) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "run", "mountPath": RUN_VOLUME},
        {"name": "cache", "mountPath": CACHE_VOLUME, "readOnly": stage is not Stage.PREPARE},
        {"name": "config", "mountPath": CONFIG_DIRECTORY, "readOnly": True},
        {"name": "report-token", "mountPath": REPORT_TOKEN_DIRECTORY, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if stage in (Stage.TRAIN, Stage.EVALUATE):
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    if _resume_claim(job, stage) is not None:
        mounts.append({"name": "resume", "mountPath": RESUME_DIRECTORY, "readOnly": True})
    if token_secret(job, program.token) is not None:
        mounts.append({"name": f"token-{program.token}", "mountPath": TOKENS_DIRECTORY, "readOnly": True})
    return mounts


def _volumes(job: Job, attempt: Attempt, programs: list[Program]) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "run", "persistentVolumeClaim": {"claimName": job.run_claim}},
        {"name": "cache", "persistentVolumeClaim": {"claimName": job.spec.storage.cache.claim_name}},
        {"name": "config", "configMap": {"name": job.config_name}},
        {"name": "report-token", "projected": {"sources": _report_token(), "defaultMode": 0o440}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if attempt.stage in (Stage.TRAIN, Stage.EVALUATE):
        # The default 64 MiB of /dev/shm are too little for NCCL.
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    resume_claim = _resume_claim(job, attempt.stage)
    if resume_claim is not None:
        # Read-only by the mount: a claim that is read-only as a whole could not be the run's own as well.
        volumes.append({"name": "resume", "persistentVolumeClaim": {"claimName": resume_claim}})
    for kind in dict.fromkeys(program.token for program in programs):
        secret = token_secret(job, kind)
        if secret is not None:
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


def _tolerations(job: Job) -> list[Manifest]:
    return [toleration.to_wire() for toleration in job.spec.pod_template.tolerations]


def gpu_resources(job: Job) -> Manifest:
    """Resources of a pod that computes: the user's, and the GPUs of the topology."""
    given = job.spec.pod_template.resources
    made: Manifest = {"requests": dict(given.requests), "limits": dict(given.limits)}
    if job.gpus_per_node:
        made["limits"] |= {"nvidia.com/gpu": str(job.gpus_per_node)}
    return {name: values for name, values in made.items() if values}
