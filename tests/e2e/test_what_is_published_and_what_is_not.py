"""The last stage on real pods: the Hub that fails, the token that may not, the model that got worse."""

from __future__ import annotations

import pytest
from tests.support.tiny import days

from finetune_api.base import Stage

from .tenant import DAYS, Tenant, condition_of, table

pytestmark = pytest.mark.timeout(1200)


def test_qlora_over_two_pods_is_better_and_a_hub_that_is_down_for_a_while_costs_an_upload_and_no_training(
    tenant: Tenant,
) -> None:
    soon = {"Retry-After": "1"}
    fault = tenant.hub.fault("POST", r"/commit/", status=503, times=None, headers=soon)
    qlora = {"method": "qlora", "lora": {"rank": 16, "alpha": 32}}
    tenant.apply(topology={"nodes": 2, "gpusPerNode": 0}, tuning=qlora)
    tenant.wait(tenant.attempt_is("failed", 1, Stage.PUBLISH), "the first upload to fail", 700)
    fault.times = 0
    status = tenant.complete()
    assert tenant.ended() == [("succeeded", False)]
    uploads = tenant.ended(Stage.PUBLISH)
    assert uploads[0] == ("hub-unavailable", False)
    assert uploads[-1] == ("succeeded", False)
    assert "adapter_model.safetensors" in tenant.hub.repo("acme/days-tuned").files
    (metric,) = [m for m in status["results"]["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["difference"]["low"] > 0
    assert status["results"]["exportDigest"] == status["export"]["digest"]


def test_without_consent_to_a_gated_model_no_pod_asks_for_a_gpu(tenant: Tenant) -> None:
    tenant.hub.repo("acme/base").gated = True
    tenant.hub.repo("acme/base").consented = set()
    tenant.apply(topology={"nodes": 3, "gpusPerNode": 2})
    status = tenant.failed()
    assert tenant.ended(Stage.PREPARE) == [("no-access", False)]
    assert "acme/base" in condition_of(status, "Failed")["message"]
    assert tenant.pods(Stage.TRAIN) == []
    assert not any("train-1" in line for line in tenant.timeline)


def test_a_model_that_got_worse_is_refused_and_nothing_is_uploaded(tenant: Tenant) -> None:
    wrong = {"good": "bad", "bad": "good"}
    train = table([(text, wrong[label]) for text, label in days(240)])
    test = table(days(60, seed=9))
    tenant.hub.add_repo("acme/days", {"train.csv": train, "test.csv": test}, kind="datasets")
    dataset = DAYS | {"splits": {"train": "train", "test": "test"}}
    tenant.apply(topology={"nodes": 1, "gpusPerNode": 0}, datasets=[dataset], split=None)
    status = tenant.failed()
    failed = condition_of(status, "Failed")
    assert failed["reason"] == "GateRefused"
    (metric,) = [m for m in status["results"]["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["tuned"] < metric["base"]
    assert tenant.pods(Stage.PUBLISH) == []
    assert not tenant.hub.seen("POST", r"/(commit|preupload)/")
    assert "adapter_model.safetensors" in tenant.files("export")
