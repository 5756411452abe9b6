"""What kopf watches: in the operator's own loop, and without what kopf would keep for itself."""

from __future__ import annotations

import inspect
from typing import Any

import kopf
import pytest
from kubernetes.aio.client import Configuration

from finetune_operator import handlers
from finetune_operator.cluster.store import Store
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.workqueue import Urgency, WorkQueue


def job(name: str, phase: str = "") -> dict[str, Any]:
    meta = {"name": name, "namespace": "ml", "uid": name, "resourceVersion": "1"}
    return {"metadata": meta} | ({"status": {"phase": phase}} if phase else {})


def handler(store: Store, queue: Any) -> Any:
    (found,) = handlers.registry(store, queue, Configuration())._watching.get_all_handlers()
    return found.fn


def test_kopf_watches_the_jobs_in_the_loop_that_store_and_queue_belong_to() -> None:
    made = handlers.registry(Store(), WorkQueue(), Configuration())
    assert inspect.iscoroutinefunction(handler(Store(), WorkQueue()))
    assert made._indexing.get_all_handlers() == []


def test_every_kind_of_child_is_watched_in_every_namespace_and_ours_alone() -> None:
    made = handlers.watches(None, Store(), WorkQueue(), PyTorchJobBackend(), ("a", "b"))  # type: ignore[arg-type]
    assert {watch.kind for watch in made} == {"Job", "PyTorchJob", "Pod", "ConfigMap"}
    assert len({(watch.kind, watch.namespace) for watch in made}) == 8
    assert {watch.labels for watch in made} == {"app.kubernetes.io/managed-by=finetune-operator"}


@pytest.mark.parametrize(
    ("type", "phase", "urgency"),
    [
        (None, "Complete", Urgency.LAST),
        (None, "Failed", Urgency.LAST),
        (None, "Training", Urgency.NEW),
        (None, "", Urgency.NEW),
        ("ADDED", "", Urgency.NEW),
        ("MODIFIED", "Training", Urgency.NOW),
        ("MODIFIED", "Complete", Urgency.NOW),
    ],
)
async def test_jobs_at_work_come_first_and_those_that_had_ended_last(
    type: str | None, phase: str, urgency: Urgency
) -> None:
    class Queue:
        added: list[Urgency] = []

        def add(self, key: object, urgency: Urgency) -> None:
            self.added.append(urgency)

    queue = Queue()
    await handler(Store(), queue)(type=type, body=kopf.Body(job("support", phase)))
    assert queue.added == [urgency]


async def test_a_job_that_the_store_knows_already_is_not_worked_on_again() -> None:
    store, queue = Store(), WorkQueue[Any]()
    for kind in (None, "MODIFIED"):
        await handler(store, queue)(type=kind, body=kopf.Body(job("support")))
    assert queue.depth == 1
    await handler(store, queue)(type="DELETED", body=kopf.Body(job("support")))
    assert store.phases() == {}


async def test_kopf_reaches_the_api_server_as_our_own_requests_do() -> None:
    access = Configuration(host="https://api.example:6443", api_key={"BearerToken": "Bearer t0"})
    access.ssl_ca_cert, access.proxy = "/ca.crt", "http://proxy:3128"
    (found,) = handlers.registry(Store(), WorkQueue(), access)._activities.get_all_handlers()[:1]
    info = await found.fn()
    assert (info.server, info.ca_path, info.proxy_url) == (access.host, "/ca.crt", "http://proxy:3128")
    assert info.as_http_headers() == {"Authorization": "Bearer t0"}


def test_kopf_does_not_compare() -> None:
    persistence = handlers.kopf_settings(clusterwide=False).persistence
    body, patch = kopf.Body({"metadata": {"annotations": {}}, "spec": {"a": 1}}), kopf.Patch()
    essence = persistence.diffbase_storage.build(body=body)
    persistence.diffbase_storage.store(body=body, patch=patch, essence=essence)
    assert (dict(essence), dict(patch)) == ({}, {})
