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

from .conftest import SYSTEM, values, wait_for_operator
from .place import TRAIN_SECONDS, Place

pytestmark = pytest.mark.timeout(1200)
ONE_NODE = {"nodes": 1, "gpusPerNode": 0}


@pytest.fixture
def chart(release: Helm, place: Place) -> Iterator[Helm]:
    """The release, put back afterwards as it was."""
    yield release
    release.install(SYSTEM, values())
    wait_for_operator(place.api)


def leader(place: Place) -> str:
    """The name of the operator's pod that holds the Lease."""
    holder = place.api.get("Lease", ACCOUNT, SYSTEM)["spec"].get("holderIdentity") or ""
    return str(holder.rpartition("_")[0])


def test_a_leader_killed_in_every_stage_is_followed_by_the_other_replica(place: Place, chart: Helm) -> None:
    chart.install(SYSTEM, values() | {"replicas": 2})
    wait_for_operator(place.api, replicas=2)
    place.apply(topology=ONE_NODE)
    killed = []
    for stage in STAGES:
        running = wait_until(lambda stage=stage: place.pods(stage), f"a pod of {stage}", TRAIN_SECONDS)  # type: ignore[misc]
        assert running
        killed.append(wait_until(lambda: leader(place), "a leader"))
        place.api.delete({"kind": "Pod", "metadata": {"name": killed[-1], "namespace": SYSTEM}}, grace_seconds=0)
    status = place.complete()
    assert len(set(killed)) > 1
    assert [(a["stage"], a["number"], a["outcome"]) for a in status["attempts"]] == [
        (stage, 1, "succeeded") for stage in STAGES
    ]
    assert len(place.hub.seen("POST", r"/commit/")) == 1


def test_an_upgrade_changes_the_crd_and_an_uninstall_leaves_the_job_under_way(
    place: Place, chart: Helm, tmp_path: Path
) -> None:
    place.apply(topology=ONE_NODE, publish=None, training__epochs=10)
    place.trained_to(1)
    before = [pod["metadata"]["uid"] for pod in place.pods()]
    newer = shutil.copytree(CHART, tmp_path / "newer")
    crd = yaml.safe_load((newer / "files" / "crd.yaml").read_text())
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["novelty"] = {
        "type": "string"
    }
    (newer / "files" / "crd.yaml").write_text(yaml.safe_dump(crd))
    chart.install(SYSTEM, values(), chart=newer)
    wait_for_operator(place.api)
    assert [pod["metadata"]["uid"] for pod in place.pods()] == before

    chart.uninstall(SYSTEM)
    wait_until(lambda: not place.api.objects("Pod", SYSTEM), "the operator to end")
    assert [pod["status"]["phase"] for pod in place.pods()] == ["Running"]
    ended = wait_until(
        lambda: [pod for pod in place.pods() if pod["status"]["phase"] == "Succeeded"], "Train", TRAIN_SECONDS
    )
    assert [pod["metadata"]["uid"] for pod in ended] == before
    assert place.pods(Stage.EVALUATE) == []

    chart.install(SYSTEM, values())
    wait_for_operator(place.api)
    status = place.complete()
    assert [(a["stage"], a["number"], a["outcome"]) for a in status["attempts"]] == [
        (stage, 1, "succeeded") for stage in STAGES if stage is not Stage.PUBLISH
    ]
