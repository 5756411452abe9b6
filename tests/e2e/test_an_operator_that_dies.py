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
from .place import AFTER_EVERY_STEP, TRAIN_SECONDS, Place

pytestmark = pytest.mark.timeout(1200)
TWO = {"replicas": 2}


@pytest.fixture
def chart(release: Helm, place: Place) -> Iterator[Helm]:
    """The release, put back afterwards as it was."""
    yield release
    release.install(SYSTEM, values(place.cluster))
    wait_for_operator(place.api)


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A chart whose CRD has one field more."""
    folder = shutil.copytree(CHART, tmp_path / "newer")
    crd = yaml.safe_load((folder / "files" / "crd.yaml").read_text())
    status = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    status["properties"]["novelty"] = {"type": "string"}
    (folder / "files" / "crd.yaml").write_text(yaml.safe_dump(crd))
    return folder


def kill_leader(place: Place, stage: Stage) -> str:
    """Kill the operator's pod that holds the Lease, once a pod of the stage is there."""
    wait_until(lambda: place.pods(stage), f"a pod of {stage}", TRAIN_SECONDS)

    def holder() -> str:
        lease = place.api.get("Lease", ACCOUNT, SYSTEM)["spec"].get("holderIdentity") or ""
        return str(lease.rpartition("_")[0])

    name = wait_until(holder, "a leader")
    place.api.delete({"kind": "Pod", "metadata": {"name": name, "namespace": SYSTEM}}, grace_seconds=0)
    return name


def test_an_operator_killed_in_every_stage_upgraded_removed_and_installed_again_disturbs_no_stage(
    place: Place, chart: Helm, newer: Path
) -> None:
    chart.install(SYSTEM, values(place.cluster) | TWO)
    wait_for_operator(place.api, replicas=2)
    full = {"method": "full"}
    place.apply(
        topology={"nodes": 2, "gpusPerNode": 0},
        tuning=full,
        training__learningRate=2.0e-3,
        checkpoint=AFTER_EVERY_STEP,
    )
    killed = [kill_leader(place, Stage.PREPARE), kill_leader(place, Stage.TRAIN)]
    place.trained_to(1)
    before = [pod["metadata"]["uid"] for pod in place.pods()]

    with place.held(place.pods()[1]):
        chart.install(SYSTEM, values(place.cluster) | TWO, chart=newer)
        wait_for_operator(place.api, replicas=2)
        assert [pod["metadata"]["uid"] for pod in place.pods()] == before

        chart.uninstall(SYSTEM)
        wait_until(lambda: not place.api.objects("Pod", SYSTEM), "the operator to end")
        assert {pod["status"]["phase"] for pod in place.pods()} == {"Running"}

    def ended() -> bool:
        return all(pod["status"]["phase"] == "Succeeded" for pod in place.pods())

    wait_until(ended, "the pods to succeed without an operator", TRAIN_SECONDS)
    assert [pod["metadata"]["uid"] for pod in place.pods()] == before
    assert place.pods(Stage.EVALUATE) == []

    chart.install(SYSTEM, values(place.cluster) | TWO)
    killed += [kill_leader(place, Stage.EVALUATE), kill_leader(place, Stage.PUBLISH)]
    status = place.complete()
    assert len(set(killed)) > 1
    assert [(a["stage"], a["number"], a["outcome"]) for a in status["attempts"]] == [
        (stage, 1, "succeeded") for stage in STAGES
    ]
    assert len(place.hub.seen("POST", r"/commit/")) == 1
    (metric,) = [m for m in status["results"]["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["difference"]["low"] > 0
