"""Names of everything a job owns: deterministic, within 63 characters and DNS-1035 for any job name."""

from __future__ import annotations

import hashlib

from finetune_api.base import Stage

MAX_LENGTH = 63
WORKER_SUFFIX_LENGTH = len("-worker-4095")


def bounded(name: str, suffix: str, limit: int = MAX_LENGTH) -> str:
    """`name` + `suffix` in at most `limit` characters, starting with a letter; a changed name carries its digest.

    Names of PyTorchJobs are DNS-1035 labels: one that starts with a digit gets a prefix, and dots become hyphens.
    """
    plain = name.replace(".", "-")
    stem = plain if plain[:1].isalpha() else f"ft-{plain}"
    if stem == name and len(stem) + len(suffix) <= limit:
        return stem + suffix
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    kept = stem[: limit - len(suffix) - len(digest) - 1].rstrip("-")
    return f"{kept}-{digest}{suffix}"


def label_value(job: str) -> str:
    """The job's name as the value of a label: the name itself unless it is too long for one."""
    return job if len(job) <= MAX_LENGTH else bounded(job, "")


def child_name(job: str, stage: Stage, number: int) -> str:
    """Name of the child of one attempt, short enough for `-worker-<index>` to follow."""
    return bounded(job, f"-{stage}-{number}", MAX_LENGTH - WORKER_SUFFIX_LENGTH)


def shared_name(job: str, what: str) -> str:
    """Name of an object that all stages share: `config`, `run`, `trainer`, …"""
    return bounded(job, f"-{what}")


def channel_name(job: str, stage: Stage) -> str:
    """Name of the ConfigMap that a stage reports into, and of the account, role and binding that allow it."""
    return shared_name(job, f"{stage}-report")
