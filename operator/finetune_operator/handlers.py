"""What is watched: every event goes into the store and its job's key onto the queue. Nothing is decided here.

kopf watches the FineTuneJobs. Their children, many times as many, are kept by watches of our own (cluster/watch.py):
kopf has a task for every object, and to index them at the start compares every object with every other. No handler
here makes kopf write a finalizer or an annotation.
"""

from __future__ import annotations

from typing import Any

import kopf

from finetune_api.base import GROUP, PLURAL
from finetune_operator.cluster.api import Api
from finetune_operator.cluster.store import ENDED, FINE_TUNE_JOB, Key, Store
from finetune_operator.cluster.watch import Watch
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.job import MANAGED_BY_LABEL, MANAGER
from finetune_operator.workqueue import Urgency, WorkQueue

WATCH_SECONDS = 600
"""How long the server is asked to keep kopf's watch."""


def registry(store: Store, queue: WorkQueue[Key]) -> kopf.OperatorRegistry:
    """The handlers of one operator."""
    made = kopf.OperatorRegistry()

    # A coroutine, although it awaits nothing: kopf runs plain functions in threads, and store and queue are the loop's.
    @kopf.on.event(registry=made, group=GROUP, plural=PLURAL)  # type: ignore[untyped-decorator]
    async def event(type: str | None, body: kopf.Body, **_: Any) -> None:
        job = dict(body)
        key = store.drop(FINE_TUNE_JOB, job) if type == "DELETED" else store.put(FINE_TUNE_JOB, job)
        if key is not None:
            queue.add(key, _urgency(job, listed=type is None))

    kopf.on.login(registry=made)(_login)
    return made


def _urgency(job: dict[str, Any], *, listed: bool) -> Urgency:
    """A job that was there and had ended comes last, a new one after those that are at work."""
    phase = (job.get("status") or {}).get("phase")
    if listed and phase in ENDED:
        return Urgency.LAST
    return Urgency.NEW if listed or phase is None else Urgency.NOW


def watches(
    api: Api, store: Store, queue: WorkQueue[Key], backend: Backend, namespaces: tuple[str, ...]
) -> list[Watch]:
    """What keeps the children of our jobs in the store: one for each kind and namespace."""
    return [
        Watch(api, store, kind, namespace, f"{MANAGED_BY_LABEL}={MANAGER}", queue.add)
        for kind in ("Job", backend.kind, "Pod", "ConfigMap")
        for namespace in namespaces or ("",)
    ]


def resyncs(api: Api, store: Store, queue: WorkQueue[Key], namespaces: tuple[str, ...]) -> list[Watch]:
    """What makes up for events about FineTuneJobs that kopf missed: after a watch broke off it tells no deletions."""
    return [Watch(api, store, FINE_TUNE_JOB, namespace, "", queue.add) for namespace in namespaces or ("",)]


def settings(*, clusterwide: bool) -> kopf.OperatorSettings:
    """kopf's own settings: it only watches."""
    made = kopf.OperatorSettings()
    # With named namespaces it may list neither namespaces nor CRDs, and would try for a minute.
    made.scanning.disabled = not clusterwide
    made.posting.enabled = False
    made.peering.standalone = True
    made.watching.server_timeout = WATCH_SECONDS
    made.watching.connect_timeout = 10.0
    # Ten thousand jobs at once would be most of the memory; and each worker holds its job's last body until it ends.
    made.watching.chunk_size = 50
    made.queueing.idle_timeout = 0.1
    made.persistence.diffbase_storage = _NoDiffs()
    made.persistence.progress_storage = _NoProgress()
    return made


class _NoDiffs(kopf.DiffBaseStorage):  # type: ignore[misc]
    """No handler asks what changed; to find it out takes kopf most of its time, even when nobody asks."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        pass


class _NoProgress(kopf.ProgressStorage):  # type: ignore[misc]
    """No handler has progress to be kept."""

    def fetch(self, *, key: str, body: kopf.Body) -> None:
        return None

    def store(self, *, key: str, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        pass

    def purge(self, *, key: str, body: kopf.Body, patch: kopf.Patch) -> None:
        pass

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: str | None) -> None:
        pass

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def _login(**kwargs: Any) -> Any:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
