import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from tests.unit.finetune_operator.decision.world import job
from tests.unit.finetune_operator.fake_cluster import FakeCluster

from finetune_api.base import STAGES
from finetune_operator.cluster.act import event_manifest, in_the_way, snapshot_image
from finetune_operator.cluster.api import ApiError, Object
from finetune_operator.cluster.observe import JobObjects, observe, read_spec
from finetune_operator.cluster.store import APPLIED, Key, Store, slim
from finetune_operator.decision.model import Event, Observation
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.manifests.trainjob import TrainJobBackend

REFUSALS = [
    (403, 'jobs "a" is forbidden: exceeded quota: gpus, requested: 8', "Quota"),
    (500, 'Internal error occurred: failed calling webhook "x": connection refused', "Webhook"),
    (404, "the server could not find the requested resource", "Webhook"),
    (422, "spec.template: Invalid value", "Refused"),
    (403, "pods is forbidden: violates PodSecurity", "Refused"),
    (500, "etcdserver: request timed out", None),
    (503, "apiserver is shutting down", None),
    (429, "too many requests", None),
    (0, "ClientConnectorError", None),
]


@pytest.mark.parametrize(("code", "message", "kind"), REFUSALS)
def test_a_refusal_is_waited_for_with_its_words_or_simply_tried_again(
    code: int, message: str, kind: str | None
) -> None:
    missing = in_the_way(ApiError(code, "", message), PyTorchJobBackend())
    assert (missing.kind if missing else None) == kind
    assert missing is None or message in missing.sentence


def test_what_has_to_be_installed_is_that_of_the_backend() -> None:
    unknown = ApiError(404, "NotFound", "the server could not find the requested resource")
    for backend, words in ((PyTorchJobBackend(), "training-operator"), (TrainJobBackend(), "Kubeflow Trainer")):
        missing = in_the_way(unknown, backend)
        assert missing is not None
        assert f"{backend.kind}s: install" in missing.sentence
        assert words in missing.sentence


def test_a_job_keeps_the_image_that_it_began_with() -> None:
    owners = [{"uid": "u1", "controller": True}]
    data = {"run-config.json": json.dumps({"image": "trainer@sha256:old", "fieldOfAnOlderVersion": 1})}
    config = {"metadata": {"ownerReferences": owners}, "data": data}
    assert snapshot_image(config, "u1") == "trainer@sha256:old"
    assert snapshot_image(config, "u2") is None
    assert snapshot_image(None, "u1") is None


def test_the_same_event_of_the_same_moment_has_the_same_name() -> None:
    seen, noon = job().observe(), datetime(2026, 1, 1, 12, tzinfo=UTC)
    event = Event("Warning", "CudaOom", "x" * 5000)
    first, second = event_manifest(seen, event, noon), event_manifest(seen, event, noon)
    assert first == second
    assert len(first["note"]) <= 1024
    assert first["regarding"]["name"] == "support"


def body(name: str, version: int, uid: str = "u", label: str = "support") -> dict[str, object]:
    meta = {
        "name": name,
        "namespace": "ml",
        "uid": uid,
        "resourceVersion": str(version),
        "labels": {"finetune.dev/job": label},
    }
    return {"metadata": meta}


KEY = Key("ml", "support")


def test_a_late_event_does_not_bring_an_older_body_back() -> None:
    store = Store()
    store.put("Pod", body("a", 7))
    store.put("Pod", body("a", 5))
    assert store.of("Pod", KEY) == (body("a", 7),)


def test_the_end_of_an_older_object_does_not_take_the_new_one_of_its_name_along() -> None:
    store = Store()
    store.put("Pod", body("a", 9, uid="new"))
    store.drop("Pod", body("a", 8, uid="old"))
    assert len(store.of("Pod", KEY)) == 1
    store.drop("Pod", body("a", 10, uid="new"))
    assert store.of("Pod", KEY) == ()


def test_what_belongs_to_no_job_is_passed_over() -> None:
    store = Store()
    assert store.put("Pod", {"metadata": {"name": "stranger", "namespace": "ml"}}) is None


@pytest.mark.parametrize("name", ["support", "n" * 80])
def test_a_job_is_found_by_the_label_of_its_children(name: str) -> None:
    store = Store()
    meta = {"name": name, "namespace": "ml", "uid": "u", "resourceVersion": "1"}
    key = store.put("FineTuneJob", {"metadata": meta})
    assert key is not None
    assert len(key.label) <= 63
    assert store.job(key) is not None


async def test_of_what_the_store_leaves_out_an_observation_needs_nothing() -> None:
    cluster, backend = FakeCluster(), PyTorchJobBackend()
    await cluster.carry_on()
    job = cluster.objects["FineTuneJob", "support"]
    job["metadata"]["annotations"] = {"finetune.dev/retry": "1", APPLIED: "x" * 10_000}
    for pod in cluster.of("Pod"):
        pod["metadata"]["managedFields"] = [{}]
        pod["spec"]["nodeName"] = "node-a"

    def seen(read: Callable[[str, Object], Object]) -> Observation:
        carriers = [read(kind, body) for kind in ("Job", "PyTorchJob") for body in cluster.of(kind)]
        channels = {s: read("ConfigMap", cluster.objects["ConfigMap", f"support-{s}-report"]) for s in STAGES}
        pods = tuple(read("Pod", pod) for pod in cluster.of("Pod"))
        spec, _ = read_spec(job)
        whole = JobObjects(read("FineTuneJob", job), spec, carriers=tuple(carriers), pods=pods, channels=channels)
        return observe(whole, backend, cluster.now)

    small, whole = seen(slim), seen(lambda _, body: body)
    assert replace(small, annotations={}) == replace(whole, annotations={})
    assert small.annotations == {"finetune.dev/retry": "1"}
    config = cluster.objects["ConfigMap", "support-config"]
    uid = job["metadata"]["uid"]
    assert snapshot_image(slim("ConfigMap", config), uid) == snapshot_image(config, uid) is not None
    sizes = {
        kind: len(json.dumps(slim(kind, body))) / len(json.dumps(body, default=str))
        for kind in ("Job", "Pod", "PyTorchJob")
        for body in cluster.of(kind)
    }
    assert max(sizes.values()) < 0.5


def test_a_body_comes_out_of_the_store_as_it_went_in_however_long_it_is() -> None:
    store = Store()
    long = body("long", 1) | {"status": {"conditions": [{"message": f"Grüße {n}"} for n in range(500)]}}
    store.put("Pod", long)
    assert store.of("Pod", KEY) == (long,)


def config_map(name: str, *owners: dict[str, object], label: str = "support", **data: str) -> Object:
    found = body(name, 1, uid=name, label=label)
    found["metadata"] = found["metadata"] | {"ownerReferences": list(owners)}  # type: ignore[operator]
    return found | {"data": data}


def test_config_maps_that_no_job_owns_cannot_fill_the_store() -> None:
    store, filler = Store(), "x" * 2**20
    owner: dict[str, object] = {"kind": "FineTuneJob", "name": "support", "uid": "u", "controller": True}
    for number in range(60):
        store.put("ConfigMap", config_map(f"filler-{number}", label="nojob", train=filler))
        store.put("ConfigMap", config_map(f"filler-{number}", owner, train=filler))
    store.put("ConfigMap", config_map("nojob-train-report", owner, label="nojob", train=filler))
    store.put("ConfigMap", config_map("support-train-report", owner | {"kind": "Pod"}, train=filler))
    assert store.of("ConfigMap", KEY) == store.of("ConfigMap", Key("ml", "nojob")) == ()
    store.put("ConfigMap", config_map("support-train-report", owner, train=filler, a="{}", evaluate="{}"))
    (kept,) = store.of("ConfigMap", KEY)
    assert kept["data"] == {"evaluate": "{}"}
