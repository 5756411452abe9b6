"""What is watched: every event goes into the store and its job's key onto the queue. Nothing is decided here.

Index handlers run before all others, and the others only when every kind has been listed: so the store is
complete when the first key arrives. No handler here makes kopf write a finalizer or an annotation.
"""

from __future__ import annotations

from typing import Any

import kopf

from finetune_operator.cluster.store import FINE_TUNE_JOB, Key, Store, slim
from finetune_operator.planning.manifests.backend import Backend
from finetune_operator.planning.manifests.job import MANAGED_BY_LABEL, MANAGER
from finetune_operator.workqueue import WorkQueue

RESYNC_SECONDS = 600
"""How often the watches are renewed by the server at most: a missed event is made up for then."""


def registry(store: Store, queue: WorkQueue[Key], backend: Backend) -> kopf.OperatorRegistry:
    """The handlers of one operator."""
    made = kopf.OperatorRegistry()
    for selector, kind in watched(backend).items():
        _watch(made, selector, kind, store, queue)
    kopf.on.login(registry=made)(_login)
    return made


def watched(backend: Backend) -> dict[tuple[str, str], str]:
    """Group and plural of every kind that is watched, with its name."""
    return {
        ("finetune.dev", "finetunejobs"): FINE_TUNE_JOB,
        ("batch", "jobs"): "Job",
        (backend.api_version.partition("/")[0], backend.plural): backend.kind,
        ("", "pods"): "Pod",
        ("", "configmaps"): "ConfigMap",
    }


def settings(backend: Backend, *, clusterwide: bool) -> kopf.OperatorSettings:
    """kopf's own settings: it only watches, and of children only ours."""
    made = kopf.OperatorSettings()
    # With named namespaces it may list neither namespaces nor CRDs, and would try for a minute.
    made.scanning.disabled = not clusterwide
    made.posting.enabled = False
    made.peering.standalone = True
    made.watching.server_timeout = RESYNC_SECONDS
    made.watching.connect_timeout = 10.0
    made.persistence.diffbase_storage = _NoDiffs()
    made.persistence.progress_storage = _NoProgress()
    for selector, kind in watched(backend).items():
        if kind != FINE_TUNE_JOB:
            made.watching.label_selectors[selector if selector[0] else selector[1]] = f"{MANAGED_BY_LABEL}={MANAGER}"
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


def _watch(
    made: kopf.OperatorRegistry, selector: tuple[str, str], kind: str, store: Store, queue: WorkQueue[Key]
) -> None:
    # Coroutines, although they await nothing: kopf runs plain functions in threads, and store and queue are the loop's.
    where = {"group": selector[0], "plural": selector[1]}

    @kopf.index(registry=made, id=f"index-{kind}", **where)  # type: ignore[untyped-decorator]
    async def index(body: kopf.Body, **_: Any) -> None:
        store.put(kind, slim(dict(body)))

    @kopf.on.event(registry=made, id=f"event-{kind}", **where)  # type: ignore[untyped-decorator]
    async def event(type: str | None, body: kopf.Body, **_: Any) -> None:
        key = store.drop(kind, slim(dict(body))) if type == "DELETED" else store.put(kind, slim(dict(body)))
        if key is not None:
            queue.add(key)


def _login(**kwargs: Any) -> Any:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
