"""Carries out what a decision asks for: creates and deletes children, writes Events. Every step is idempotent."""

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
from finetune_operator.manifests.shared import shared_manifests, stage_channel

log = logging.getLogger(__name__)
REPORTING_CONTROLLER = "finetune.dev/operator"


class Actor:
    """Carries out the actions of decisions; keeps no state per job. `on_created` is called with each new object."""

    def __init__(self, api: Api, backend: Backend, on_created: Callable[[Object], None]) -> None:
        self._api, self._backend, self._on_created = api, backend, on_created

    async def start(
        self, observation: Observation, attempt: Attempt, config: Object | None, channel: Object | None
    ) -> Missing | None:
        """Create the child of an attempt, and before it what is missing: what all stages share, the stage's channel.

        Returns what blocks it, if anything.
        """
        image = snapshot_image(config, observation.uid)
        job = job_of(observation, image or observation.spec.image or observation.environment.image)
        try:
            shared = shared_manifests(job) if image is None else []
            own = stage_channel(job, attempt.stage) if channel is None or owner_uid(channel) != job.uid else []
            for manifest in (*shared, *own):
                await self._make(manifest, job.uid)
            await self._check_alone(observation, attempt)
            for manifest in child_manifests(job, attempt, self._backend):
                await self._make(manifest, job.uid)
        except ApiError as error:
            missing = in_the_way(error, self._backend)
            if missing is None:
                raise
            return missing
        except LeftoverError as error:
            return Missing("Leftover", error.name, str(error))
        return None

    async def _check_alone(self, observation: Observation, attempt: Attempt) -> None:
        """Before another attempt: check that no pod of the previous one is left, with the API server, not the store."""
        if attempt.number == 1:
            return
        labels = f"{UID_LABEL}={observation.uid},{STAGE}={attempt.stage},{ATTEMPT}={attempt.number - 1}"
        known = {pod.name for child in observation.children for pod in child.pods if pod.out_of_service}
        for pod in await self._api.list("Pod", observation.namespace, labels):
            if pod["metadata"]["name"] not in known and pod.get("status", {}).get("phase") != "Succeeded":
                name = pod["metadata"]["name"]
                raise LeftoverError(name, f"Waiting for pod {name} of the previous attempt to be deleted.")

    async def _make(self, manifest: Object, uid: str) -> None:
        """Create an object; success if it exists already and is our own, or is a claim that outlives jobs."""
        try:
            self._on_created(await self._api.create(manifest))
        except ApiError as error:
            if error.code != 409 or error.reason != "AlreadyExists":
                raise
            await self._accept_existing(manifest, uid)

    async def _accept_existing(self, manifest: Object, uid: str) -> None:
        meta = manifest["metadata"]
        kind, name = manifest["kind"], meta["name"]
        existing = await self._api.find(kind, meta["namespace"], name)
        if existing is None:
            raise LeftoverError(name, f"{kind} {name} of an older job was just deleted.")
        if "ownerReferences" not in meta or owner_uid(existing) == uid:
            self._on_created(existing)
            return
        raise LeftoverError(name, f"Waiting for {kind} {name} to be deleted: it does not belong to this job.")

    async def delete_child(self, observation: Observation, stage: Stage, number: int) -> None:
        """Delete the child of an attempt, and with it, in the background, its pods.

        The child goes last: it is what is looked for, so that whatever was missed before is tried again.
        """
        kinds = (*self._backend.companions, self._backend.kind) if stage is Stage.TRAIN else ("Job",)
        for kind in kinds:
            await self._api.delete(kind, observation.namespace, child_name(observation.name, stage, number))

    async def clean_up(self, observation: Observation) -> None:
        """Delete the children of a finished job; the few small objects that its pods shared go with the job itself."""
        for child in observation.children:
            if child.ours and child.exists:
                await self.delete_child(observation, child.stage, child.number)

    async def tell(self, observation: Observation, event: Event, now: datetime) -> None:
        """Write a Kubernetes Event; a failure is only logged."""
        try:
            await self._api.create(event_manifest(observation, event, now))
        except ApiError as error:
            if error.reason != "AlreadyExists":
                log.warning("Event %s was not written: %s", event.reason, error)


class LeftoverError(Exception):
    """Something of an older job or attempt is still there."""

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(sentence)
        self.name = name


def job_of(observation: Observation, image: str) -> Job:
    """The job as the manifests need it."""
    return Job(
        observation.namespace, observation.name, observation.uid, observation.spec, image, observation.environment
    )


def snapshot_image(config: Object | None, uid: str) -> str | None:
    """The image that the job started with, from its run config; None before it has started."""
    if config is None or owner_uid(config) != uid:
        return None
    text = (config.get("data") or {}).get(RUN_CONFIG_FILE, "")
    # Read loosely: an older operator's snapshot may hold fields that this one does not know.
    try:
        return str(json.loads(text).get("image", ""))
    except (ValueError, AttributeError, RecursionError):
        return RunConfig.model_fields["image"].default  # type: ignore[no-any-return]


def in_the_way(error: ApiError, backend: Backend) -> Missing | None:
    """What to wait for after a refused creation; None for errors that are simply retried."""
    text = error.message
    if error.code == 403 and "exceeded quota" in text:
        return Missing("Quota", "quota", f"A quota is exhausted: {text}")
    if "failed calling webhook" in text:
        return Missing("Webhook", "webhook", f"A webhook of the cluster does not respond yet: {text}")
    if error.code == 404:
        sentence = f"The cluster does not know {backend.kind}s: install {backend.provider}. {text}"
        return Missing("Webhook", "api", sentence)
    if error.code in (400, 403, 422):
        return Missing("Refused", "refused", f"The API server rejected the pods' owner: {text}")
    return None


def event_manifest(observation: Observation, event: Event, now: datetime) -> Object:
    """An Event of events.k8s.io/v1; the same event at the same time has the same name."""
    stamp = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    identity = f"{observation.uid}{event.reason}{event.message}{now:%Y%m%d%H%M%S}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{shared_name(observation.name, 'event')}.{digest}", "namespace": observation.namespace},
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
            "name": observation.name,
            "namespace": observation.namespace,
            "uid": observation.uid,
        },
    }
