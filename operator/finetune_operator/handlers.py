"""What is watched: every event goes into the store and its job's key onto the queue. Nothing is decided here.

kopf watches the FineTuneJobs, answers the liveness probe, and ends at a signal. What it does not do, and why, is in
docs/decisions/0019-what-kopf-does-here.md. No handler here makes kopf write a finalizer or an annotation.
"""

from __future__ import annotations

from typing import Any
from urllib.request import getproxies

import kopf
from kubernetes.aio.client import Configuration

from finetune_api.base import GROUP, PLURAL
from finetune_operator.cluster.api import Api
from finetune_operator.cluster.store import ENDED, FINE_TUNE_JOB, Key, Store
from finetune_operator.cluster.watch import Watch
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.job import MANAGED_BY_LABEL, MANAGER
from finetune_operator.workqueue import Urgency, WorkQueue

WATCH_SECONDS = 600
"""How long the server is asked to keep kopf's watch."""


def registry(store: Store, queue: WorkQueue[Key], access: Configuration) -> kopf.OperatorRegistry:
    """The handlers of one operator; `access` is how our own requests reach the API server."""
    handlers = kopf.OperatorRegistry()

    # Coroutines, even where they await nothing: kopf runs plain functions in threads, and store and queue belong to
    # the loop.
    @kopf.on.event(registry=handlers, group=GROUP, plural=PLURAL)  # type: ignore[untyped-decorator]
    async def event(type: str | None, body: kopf.Body, **_: Any) -> None:
        job = dict(body)
        key = store.drop(FINE_TUNE_JOB, job) if type == "DELETED" else store.put(FINE_TUNE_JOB, job)
        if key is not None:
            queue.add(key, _urgency(job, listed=type is None))

    @kopf.on.login(registry=handlers)  # type: ignore[untyped-decorator]
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await _connection(access)

    @kopf.on.probe(registry=handlers, id="queue")  # type: ignore[untyped-decorator]
    async def queue_depth(**_: Any) -> int:
        return queue.depth

    return handlers


async def _connection(access: Configuration) -> kopf.ConnectionInfo:
    """The client's access for kopf, which asks again when a token is no longer accepted."""
    scheme, _, token = (await access.get_api_key_with_prefix("BearerToken") or "").partition(" ")
    return kopf.ConnectionInfo(
        server=access.host,
        ca_path=access.ssl_ca_cert,
        insecure=not access.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=access.cert_file,
        private_key_path=access.key_file,
        proxy_url=access.proxy,
        trust_env=bool(getproxies()),
    )


def _urgency(job: dict[str, Any], *, listed: bool) -> Urgency:
    """A job that had ended before the start comes last, a new one after those at work."""
    phase = (job.get("status") or {}).get("phase")
    if listed and phase in ENDED:
        return Urgency.LAST
    return Urgency.NEW if listed or phase is None else Urgency.NOW


def watches(
    api: Api, store: Store, queue: WorkQueue[Key], backend: Backend, namespaces: tuple[str, ...]
) -> list[Watch]:
    """The watches that keep the children of our jobs in the store: one per kind and namespace."""
    return [
        Watch(api, store, kind, namespace, f"{MANAGED_BY_LABEL}={MANAGER}", queue.add)
        for kind in ("Job", backend.kind, "Pod", "ConfigMap")
        for namespace in namespaces or ("",)
    ]


def resyncs(api: Api, store: Store, queue: WorkQueue[Key], namespaces: tuple[str, ...]) -> list[Watch]:
    """Lists of FineTuneJobs for what kopf misses: it reports no deletions that happened while its watch was broken."""
    return [Watch(api, store, FINE_TUNE_JOB, namespace, "", queue.add) for namespace in namespaces or ("",)]


def kopf_settings(*, clusterwide: bool) -> kopf.OperatorSettings:
    """kopf's own settings: it only watches."""
    settings = kopf.OperatorSettings()
    # With named namespaces it may list neither namespaces nor CRDs, and would try for a minute.
    settings.scanning.disabled = not clusterwide
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.connect_timeout = 10.0
    # Ten thousand jobs at once would be most of the memory; and each worker holds its job's last body until it ends.
    settings.watching.chunk_size = 50
    settings.queueing.idle_timeout = 0.1
    settings.persistence.diffbase_storage = _NoDiffs()
    return settings


class _NoDiffs(kopf.DiffBaseStorage):  # type: ignore[misc]
    """No handler asks what changed; kopf computes it all the same, which would be most of its time."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass
