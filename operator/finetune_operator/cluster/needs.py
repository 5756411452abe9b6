"""What a stage needs in its namespace before it can start: Secrets and claims. Read by name, only when needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJobSpec, SecretKey
from finetune_operator.cluster.api import Api
from finetune_operator.decision.model import Missing
from finetune_operator.programs import programs_of, secret_of

FRESH = timedelta(seconds=2)
"""For this long an object that was found counts as existing: many jobs need the same Secret and claim."""


@dataclass(frozen=True)
class Needs:
    """What is missing, and a digest that changes when a Secret does."""

    missing: tuple[Missing, ...] = ()
    credentials_version: str = ""


@dataclass(frozen=True)
class _Found:
    """An object that was found; of a Secret, the names of its keys but no values."""

    seen: datetime
    version: str
    keys: frozenset[str]


@dataclass
class Prerequisites:
    """Reads Secrets and claims by name; what is missing is read again each time."""

    api: Api
    _known: dict[tuple[str, str, str], _Found] = field(default_factory=dict)

    async def look(self, namespace: str, spec: FineTuneJobSpec, stage: Stage, now: datetime) -> Needs:
        """Look up every Secret and claim that the stage's pods would mount."""
        missing: list[Missing] = []
        versions: list[str] = []
        for where, secret in secrets_of(spec, stage).items():
            sight = await self._find("Secret", namespace, secret.name, now)
            versions.append(sight.version if sight else "")
            lacking = _lacking(where, secret, sight)
            if lacking is not None:
                missing.append(lacking)
        for where, claim in claims_of(spec, stage).items():
            if await self._find("PersistentVolumeClaim", namespace, claim, now) is None:
                sentence = f"PersistentVolumeClaim {claim} ({where}) does not exist in {namespace}: create it."
                missing.append(Missing("PersistentVolumeClaim", claim, sentence))
        version = hashlib.sha256("/".join(versions).encode()).hexdigest()[:16] if versions else ""
        return Needs(tuple(missing), version)

    async def _find(self, kind: str, namespace: str, name: str, now: datetime) -> _Found | None:
        known = self._known.get((kind, namespace, name))
        if known is not None and now - known.seen < FRESH:
            return known
        body = await self.api.find(kind, namespace, name)
        self._known = {thing: sight for thing, sight in self._known.items() if now - sight.seen < FRESH}
        if body is None:
            return None
        sight = _Found(now, body["metadata"]["resourceVersion"], frozenset(body.get("data") or {}))
        self._known[kind, namespace, name] = sight
        return sight


def secrets_of(spec: FineTuneJobSpec, stage: Stage) -> dict[str, SecretKey]:
    """Secrets that a stage mounts, by the field that names them."""
    named = (secret_of(spec.credentials, program.token) for program in programs_of(stage, spec))
    return dict(sorted(dict(filter(None, named)).items()))


def claims_of(spec: FineTuneJobSpec, stage: Stage) -> dict[str, str]:
    """Claims that must exist already, by the field that names them."""
    resume_from = spec.training.resume_from
    wanted = {
        "storage.cache.claimName": spec.storage.cache.claim_name,
        "storage.run.claimName": spec.storage.run.claim_name,
    }
    if resume_from is not None and stage is Stage.TRAIN:
        wanted["training.resumeFrom.claim"] = resume_from.claim
    return {field: claim for field, claim in wanted.items() if claim}


def _lacking(where: str, secret: SecretKey, sight: _Found | None) -> Missing | None:
    if sight is None:
        sentence = f"Secret {secret.name} ({where}) does not exist: create it with the key {secret.key}."
        return Missing("Secret", secret.name, sentence)
    if secret.key not in sight.keys:
        sentence = f"Secret {secret.name} ({where}) has no key {secret.key}: add it."
        return Missing("Secret", secret.name, sentence)
    return None
