"""What a stage needs of its namespace before it can start: Secrets and claims. Asked by name, only when it matters."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJobSpec, SecretKey
from finetune_operator.cluster.api import Api, Object
from finetune_operator.planning.model import Missing


@dataclass(frozen=True)
class Needs:
    """What is missing, and a word that changes when a Secret does."""

    missing: tuple[Missing, ...] = ()
    credentials_version: str = ""


async def look(api: Api, namespace: str, spec: FineTuneJobSpec, stage: Stage) -> Needs:
    """Ask for every Secret and claim that the stage's pods would mount."""
    missing: list[Missing] = []
    versions: list[str] = []
    for field, secret in secrets_of(spec, stage).items():
        body = await api.find("Secret", namespace, secret.name)
        versions.append(body["metadata"]["resourceVersion"] if body else "")
        lacking = _lacking(field, secret, body)
        if lacking is not None:
            missing.append(lacking)
    for field, claim in claims_of(spec, stage).items():
        if await api.find("PersistentVolumeClaim", namespace, claim) is None:
            sentence = f"PersistentVolumeClaim {claim} ({field}) does not exist in {namespace}: create it."
            missing.append(Missing("PersistentVolumeClaim", claim, sentence))
    version = hashlib.sha256("/".join(versions).encode()).hexdigest()[:16] if versions else ""
    return Needs(tuple(missing), version)


def secrets_of(spec: FineTuneJobSpec, stage: Stage) -> dict[str, SecretKey]:
    """Secrets that a stage mounts, by the field that names them."""
    credentials = spec.credentials
    write = (
        {"credentials.publish": credentials.publish} if credentials.publish else {"credentials.hub": credentials.hub}
    )
    wanted: dict[str, SecretKey | None] = {}
    if stage is Stage.PREPARE:
        wanted["credentials.hub"] = credentials.hub
        wanted.update(write if spec.publish is not None else {})
    elif stage is Stage.TRAIN:
        wanted["credentials.wandb"] = credentials.wandb
    elif stage is Stage.PUBLISH:
        wanted.update(write)
    return {field: secret for field, secret in wanted.items() if secret is not None}


def claims_of(spec: FineTuneJobSpec, stage: Stage) -> dict[str, str]:
    """Claims that must be there already, by the field that names them."""
    resume_from = spec.training.resume_from
    wanted = {
        "storage.cache.claimName": spec.storage.cache.claim_name,
        "storage.run.claimName": spec.storage.run.claim_name,
    }
    if resume_from is not None and stage is Stage.TRAIN:
        wanted["training.resumeFrom.claim"] = resume_from.claim
    return {field: claim for field, claim in wanted.items() if claim}


def _lacking(field: str, secret: SecretKey, body: Object | None) -> Missing | None:
    if body is None:
        sentence = f"Secret {secret.name} ({field}) does not exist: create it with the key {secret.key}."
        return Missing("Secret", secret.name, sentence)
    if secret.key not in (body.get("data") or {}):
        sentence = f"Secret {secret.name} ({field}) has no key {secret.key}."
        return Missing("Secret", secret.name, sentence)
    return None
