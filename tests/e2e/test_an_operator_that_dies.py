"""The operator comes and goes while a job is under way: killed, upgraded, removed; the job does not notice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.integration.harness.helm import CHART, Helm
from tests.integration.harness.operator import ACCOUNT
from tests.integration.harness.processes import wait_until

from finetune_api.base import STAGES, Stage

from .conftest import values, wait_for_operator
from .given import SYSTEM
from .tenant import AFTER_EVERY_STEP, TRAIN_SECONDS, Tenant

pytestmark = pytest.mark.timeout(1200)
TWO = {"replicas": 2}


@pytest.fixture
def chart(release: Helm, tenant: Tenant) -> Iterator[Helm]:
    """The release, put back afterwards as it was."""
    yield release
    release.install(SYSTEM, values(tenant.cluster))
    wait_for_operator(tenant.api)


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A chart whose CRD has one field more."""
    folder = shutil.copytree(CHART, tmp_path / "newer")
    crd = yaml.safe_load((folder / "files" / "crd.yaml").read_text())
    status = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    status["properties"]["novelty"] = {"type": "string"}
    (folder / "files" / "crd.yaml").write_text(yaml.safe_dump(crd))
    return folder


def kill_leader(tenant: Tenant, stage: Stage) -> str:
    """Kill the operator's pod that holds the Lease, once a pod of the stage is there."""
    wait_until(lambda: tenant.pods(stage), f"a pod of {stage}", TRAIN_SECONDS)

    def holder() -> str:
        lease = tenant.api.get("Lease", ACCOUNT, SYSTEM)["spec"].get("holderIdentity") or ""
        return str(lease.rpartition("_")[0])

    name = wait_until(holder, "a leader")
    tenant.api.delete({"kind": "Pod", "metadata": {"name": name, "namespace": SYSTEM}}, grace_seconds=0)
    return name


def test_an_operator_killed_in_every_stage_upgraded_removed_and_installed_again_disturbs_no_stage(
    tenant: Tenant, chart: Helm, newer: Path
) -> None:
    chart.install(SYSTEM, values(tenant.cluster) | TWO)
    wait_for_operator(tenant.api, replicas=2)
    full = {"method": "full"}
    tenant.apply(
        topology={"nodes": 2, "gpusPerNode": 0},
        tuning=full,
        training__learningRate=2.0e-3,
        checkpoint=AFTER_EVERY_STEP,
    )
    killed = [kill_leader(tenant, Stage.PREPARE), kill_leader(tenant, Stage.TRAIN)]
    tenant.trained_to(1)
    before = [pod["metadata"]["uid"] for pod in tenant.pods()]

    with tenant.held(tenant.pods()[1]):
        chart.install(SYSTEM, values(tenant.cluster) | TWO, chart=newer)
        wait_for_operator(tenant.api, replicas=2)
        assert [pod["metadata"]["uid"] for pod in tenant.pods()] == before

        chart.uninstall(SYSTEM)
        wait_until(lambda: not tenant.api.objects("Pod", SYSTEM), "the operator to end")
        assert {pod["status"]["phase"] for pod in tenant.pods()} == {"Running"}

    def ended() -> bool:
        return all(pod["status"]["phase"] == "Succeeded" for pod in tenant.pods())

    wait_until(ended, "the pods to succeed without an operator", TRAIN_SECONDS)
    assert [pod["metadata"]["uid"] for pod in tenant.pods()] == before
    assert tenant.pods(Stage.EVALUATE) == []

    chart.install(SYSTEM, values(tenant.cluster) | TWO)
    killed += [kill_leader(tenant, Stage.EVALUATE), kill_leader(tenant, Stage.PUBLISH)]
    status = tenant.complete()
    assert len(set(killed)) > 1
    assert [(a["stage"], a["number"], a["outcome"]) for a in status["attempts"]] == [
        (stage, 1, "succeeded") for stage in STAGES
    ]
    assert len(tenant.hub.seen("POST", r"/commit/")) == 1
    (metric,) = [m for m in status["results"]["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["difference"]["low"] > 0
