"""The handlers that kopf calls: in the operator's own loop, and without what kopf would keep for itself."""

from __future__ import annotations

import inspect

import kopf

from finetune_operator import handlers
from finetune_operator.cluster.store import Store
from finetune_operator.planning.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.workqueue import WorkQueue


def test_handlers_run_in_the_loop_that_store_and_queue_belong_to() -> None:
    made = handlers.registry(Store(), WorkQueue(), PyTorchJobBackend())
    found = [*made._watching.get_all_handlers(), *made._indexing.get_all_handlers()]
    assert len(found) == 2 * len(handlers.watched(PyTorchJobBackend()))
    assert all(inspect.iscoroutinefunction(handler.fn) for handler in found)


def test_kopf_neither_compares_nor_remembers() -> None:
    persistence = handlers.settings(PyTorchJobBackend(), clusterwide=False).persistence
    body, patch = kopf.Body({"metadata": {"annotations": {}}, "spec": {"a": 1}}), kopf.Patch()
    essence = persistence.diffbase_storage.build(body=body)
    persistence.diffbase_storage.store(body=body, patch=patch, essence=essence)
    persistence.progress_storage.store(key="event", record={}, body=body, patch=patch)
    persistence.progress_storage.touch(body=body, patch=patch, value="x")
    assert (dict(essence), dict(patch)) == ({}, {})
