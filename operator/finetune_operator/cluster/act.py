"""What a decision asks for, done: children made, deleted, cleaned up, Events told. Every step may be done twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from datetime import datetime

from finetune_api.base import API_VERSION, KIND, Stage
from finetune_api.runconfig import RUN_CONFIG_FILE, Attempt, RunConfig
from finetune_operator.cluster.api import Api, ApiError, Object
from finetune_operator.cluster.observe import owner_uid
from finetune_operator.decision.model import Event, Missing, Observation
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.children import child_manifests
from finetune_operator.manifests.job import UID_LABEL, Job
from finetune_operator.manifests.labels import ATTEMPT, STAGE
from finetune_operator.manifests.names import child_name, shared_name
from finetune_operator.manifests.shared import run_config, shared_manifests

log = logging.getLogger(__name__)
REPORTING_CONTROLLER = "finetune.dev/operator"


class Actor:
    """Carries decisions out for one job at a time; knows no job by itself. `made` is told what was created."""

    def __init__(self, api: Api, backend: Backend, made: Callable[[Object], None]) -> None:
        self._api, self._backend, self._made = api, backend, made

    async def start(self, seen: Observation, attempt: Attempt, config: Object | None) -> Missing | None:
        """Make what all stages share, then the child of an attempt. Says what is in the way, if anything."""
        image = snapshot_image(config, seen.uid)
        job = job_of(seen, image or seen.spec.image or seen.environment.image)
        try:
            if image is None:
                await self._share(job)
            await self._check_alone(seen, attempt)
            for manifest in child_manifests(job, attempt, self._backend):
                await self._make(manifest, seen.uid)
        except ApiError as error:
            missing = in_the_way(error, self._backend)
            if missing is None:
                raise
            return missing
        except LeftoverError as error:
            return Missing("Leftover", error.name, str(error))
        return None

    async def _share(self, job: Job) -> None:
        """Make the shared objects; the run config comes last, so that its presence says that all are there."""
        marker = run_config(job)["metadata"]["name"]
        made = sorted(shared_manifests(job), key=lambda manifest: manifest["metadata"]["name"] == marker)
        for manifest in made:
            await self._make(manifest, job.uid)

    async def _check_alone(self, seen: Observation, attempt: Attempt) -> None:
        """Before another try: that no pod of an earlier one is there, asked of the API server and not of the store."""
        if attempt.number == 1:
            return
        labels = f"{UID_LABEL}={seen.uid},{STAGE}={attempt.stage},{ATTEMPT}={attempt.number - 1}"
        known = {pod.name for child in seen.children for pod in child.pods if pod.out_of_service}
        for pod in await self._api.list("Pod", seen.namespace, labels):
            if pod["metadata"]["name"] not in known and pod.get("status", {}).get("phase") != "Succeeded":
                name = pod["metadata"]["name"]
                raise LeftoverError(name, f"Waits until pod {name} of the attempt before is gone.")

    async def _make(self, manifest: Object, uid: str) -> None:
        """Create an object; one of our own that exists is success, a claim that is kept as well."""
        try:
            self._made(await self._api.create(manifest))
        except ApiError as error:
            if error.code != 409 or error.reason != "AlreadyExists":
                raise
            await self._accept_existing(manifest, uid)

    async def _accept_existing(self, manifest: Object, uid: str) -> None:
        meta = manifest["metadata"]
        kind, name = manifest["kind"], meta["name"]
        existing = await self._api.find(kind, meta["namespace"], name)
        if existing is None:
            raise LeftoverError(name, f"{kind} {name} of an older job has just gone.")
        if "ownerReferences" not in meta or owner_uid(existing) == uid:
            self._made(existing)
            return
        raise LeftoverError(name, f"Waits until {kind} {name}, which this job does not own, is gone.")

    async def delete_child(self, seen: Observation, stage: Stage, number: int) -> None:
        """Delete the child of an attempt, and with it, in the background, its pods.

        The child goes last: it is what is looked for, so that whatever was missed before is tried again.
        """
        kinds = (*self._backend.companions, self._backend.kind) if stage is Stage.TRAIN else ("Job",)
        for kind in kinds:
            await self._api.delete(kind, seen.namespace, child_name(seen.name, stage, number))

    async def clean_up(self, seen: Observation) -> None:
        """Delete the children of a finished job; the few small objects that its pods shared go with the job itself."""
        for child in seen.children:
            if child.ours and child.exists:
                await self.delete_child(seen, child.stage, child.number)

    async def tell(self, seen: Observation, event: Event, now: datetime) -> None:
        """Write a Kubernetes Event; that it could not be told is logged and nothing more."""
        try:
            await self._api.create(event_manifest(seen, event, now))
        except ApiError as error:
            if error.reason != "AlreadyExists":
                log.warning("Event %s was not written: %s", event.reason, error)


class LeftoverError(Exception):
    """Something of an older job or attempt is in the way."""

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(sentence)
        self.name = name


def job_of(seen: Observation, image: str) -> Job:
    """The job as manifests see it."""
    return Job(seen.namespace, seen.name, seen.uid, seen.spec, image, seen.environment)


def snapshot_image(config: Object | None, uid: str) -> str | None:
    """The image that the job began with, from its run config; None while it has not begun."""
    if config is None or owner_uid(config) != uid:
        return None
    text = (config.get("data") or {}).get(RUN_CONFIG_FILE, "")
    # Read loosely: an older operator's snapshot may hold fields that this one does not know.
    try:
        return str(json.loads(text).get("image", ""))
    except ValueError:
        return RunConfig.model_fields["image"].default  # type: ignore[no-any-return]


def in_the_way(error: ApiError, backend: Backend) -> Missing | None:
    """What a refusal to create something is waited for as; None for errors that are simply tried again."""
    text = error.message
    if error.code == 403 and "exceeded quota" in text:
        return Missing("Quota", "quota", f"A quota is used up: {text}")
    if "failed calling webhook" in text:
        return Missing("Webhook", "webhook", f"A webhook of the cluster does not answer yet: {text}")
    if error.code == 404:
        sentence = f"The cluster does not know {backend.kind}s: install {backend.provider}. {text}"
        return Missing("Webhook", "api", sentence)
    if error.code in (400, 403, 422):
        return Missing("Refused", "refused", f"The API server refuses to make the pods' owner: {text}")
    return None


def event_manifest(seen: Observation, event: Event, now: datetime) -> Object:
    """An Event of events.k8s.io/v1; the same event of the same moment has the same name."""
    stamp = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    identity = f"{seen.uid}{event.reason}{event.message}{now:%Y%m%d%H%M%S}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{shared_name(seen.name, 'event')}.{digest}", "namespace": seen.namespace},
        "eventTime": stamp,
        "reportingController": REPORTING_CONTROLLER,
        "reportingInstance": REPORTING_CONTROLLER,
        "action": "Reconcile",
        "type": event.type,
        "reason": event.reason[:128],
        "note": event.message[:1000],
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": seen.name,
            "namespace": seen.namespace,
            "uid": seen.uid,
        },
    }
