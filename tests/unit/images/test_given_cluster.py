"""A cluster that is given to the end-to-end tests: what it lacks is one sentence that says what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tests.e2e import given
from tests.e2e.clusters import OF_TESTS
from tests.e2e.given import GivenCluster
from tests.integration.harness.processes import free_ports

IMAGE = "registry.example.com/finetune-trainer:1"
SYSTEM: dict[str, Any] = {"metadata": {}}
OURS = {"metadata": {"labels": dict(OF_TESTS)}}
PYTORCHJOBS = "pytorchjobs.kubeflow.org"


def node(name: str, *, ready: str = "True", address: str = "127.0.0.1", **spec: Any) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": ready}]
    addresses = [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": address}]
    return {"metadata": {"name": name}, "spec": spec, "status": {"conditions": conditions, "addresses": addresses}}


def storage(name: str, default: bool = False) -> dict[str, Any]:
    mark = {"storageclass.kubernetes.io/is-default-class": "true"} if default else {}
    return {"metadata": {"name": name, "annotations": mark}}


def looked_at(
    there: Mapping[str, Any], *, nodes: int = 1, classes: tuple[dict[str, Any], ...] = (storage("fast", True),)
) -> GivenCluster:
    """A cluster that was looked at, in which the objects of these names are."""
    cluster = GivenCluster(Path(__file__), None, None, "registry.example.com/")
    objects = {"Node": [node(f"node-{number}") for number in range(nodes)], "StorageClass": list(classes)}
    cluster.api = SimpleNamespace(find=lambda kind, name: there.get(name), objects=objects.get)  # type: ignore[assignment]
    cluster._look()
    return cluster


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file"),
        ("- no kubeconfig", "is no kubeconfig that can be used"),
        ("{a: [", "is no kubeconfig that can be used"),
        (f"server: https://127.0.0.1:{free_ports(1)[0]}", "cannot be reached"),
    ],
    ids=["absent", "something else", "not YAML", "nobody answers"],
)
def test_a_kubeconfig_that_leads_to_no_cluster_is_told(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "kubeconfig"
    if content and content.startswith("server"):
        parts = {"clusters": {"cluster": yaml.safe_load(content)}, "users": {"user": {"token": "t"}}}
        parts["contexts"] = {"context": {"cluster": "a", "user": "a"}}
        named = {kind: [{"name": "a", **part}] for kind, part in parts.items()}
        content = yaml.safe_dump({"current-context": "a", **named})
    if content:
        file.write_text(content)
    with pytest.raises(SystemExit, match=says) as said:
        GivenCluster(file, None, None, "").start()
    assert str(file) in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({}, "Install the training-operator: kubectl apply"),
        ({PYTORCHJOBS: {}, given.SYSTEM: SYSTEM}, "finetune-operator is installed there"),
        ({PYTORCHJOBS: {}, given.CRD: SYSTEM}, "finetune-operator is installed there"),
    ],
    ids=["no training-operator", "somebody's release", "somebody's jobs"],
)
def test_a_cluster_without_the_training_operator_or_with_somebodys_jobs_is_left_alone(
    there: dict[str, Any], says: str
) -> None:
    with pytest.raises(SystemExit, match=says):
        looked_at(there)


def test_a_release_that_a_killed_run_of_the_tests_has_left_is_taken_over() -> None:
    looked_at({PYTORCHJOBS: {}, given.CRD: SYSTEM, given.SYSTEM: OURS})


def test_nodes_of_one_share_a_claim_that_is_there_and_several_have_one_made_that_all_can_write() -> None:
    one, three = looked_at({PYTORCHJOBS: {}}), looked_at({PYTORCHJOBS: {}}, nodes=3)
    assert (one.address, one.images["operator"].rpartition(":")[0]) == (
        "127.0.0.1",
        "registry.example.com/finetune-operator",
    )
    assert one.storage == {"claimName": "days-run"}
    assert three.storage == {"size": "1Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany"}


@pytest.mark.parametrize(
    "unfit",
    [
        node("a", ready="Unknown"),
        node("a", unschedulable=True),
        node("a", taints=[{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]),
    ],
    ids=["silent", "cordoned", "tainted"],
)
def test_a_node_that_takes_no_pods_is_none(unfit: dict[str, Any]) -> None:
    preferred = node("b", taints=[{"key": "any", "effect": "PreferNoSchedule"}])
    assert given.taking_pods([unfit, preferred]) == [preferred]
    with pytest.raises(SystemExit, match="no node that is ready"):
        given.taking_pods([unfit])


@pytest.mark.parametrize(
    ("classes", "wanted", "says"),
    [
        ([storage("fast"), storage("slow")], "quick", "no StorageClass quick .*there are: fast, slow"),
        ([storage("fast")], "", "name one with --storage-class; there are: fast"),
        ([], "", "there are: none"),
    ],
)
def test_a_class_that_is_not_there_is_told_with_those_that_are(
    classes: list[dict[str, Any]], wanted: str, says: str
) -> None:
    with pytest.raises(SystemExit, match=says):
        given.storage_class(classes, wanted)


def test_a_class_that_is_named_wins_over_the_default() -> None:
    classes = [storage("fast"), storage("slow", default=True)]
    assert given.storage_class(classes, "") == "slow"
    assert given.storage_class(classes, "fast") == "fast"


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(SystemExit, match=r"192\.0\.2\.1 \(--host-address\) is no address of this machine"):
        given.listening("192.0.2.1").__enter__()
    with pytest.raises(SystemExit, match="name one with --host-address"):
        given.address_towards({"status": {"addresses": []}})


def container(state: str, **fields: Any) -> dict[str, Any]:
    return {"image": IMAGE, "state": {state: fields}}


@pytest.mark.parametrize(
    ("status", "events", "says"),
    [
        ({"phase": "Pending"}, [], None),
        ({"containerStatuses": [container("waiting", reason="ContainerCreating")]}, [], None),
        ({"containerStatuses": [container("waiting", reason="ErrImagePull")]}, [], None),
        ({"containerStatuses": [container("terminated", exitCode=0)]}, [], None),
        ({"containerStatuses": [container("waiting", reason="ImagePullBackOff")]}, [], f"{IMAGE}.*--image-prefix"),
        ({"initContainerStatuses": [container("waiting", reason="ErrImageNeverPull")]}, [], "load it into them"),
        (
            {"containerStatuses": [container("terminated", exitCode=1, message="cannot reach this machine")]},
            [],
            "a pod of .* cannot reach this machine",
        ),
        ({"containerStatuses": [container("terminated", exitCode=137, reason="OOMKilled")]}, [], "OOMKilled"),
        ({"phase": "Failed", "reason": "Evicted"}, [], "Evicted"),
        (
            {"phase": "Pending"},
            [{"reason": "ProvisioningFailed", "message": "only ReadWriteOnce"}],
            r"StorageClass fast gives no ReadWriteMany volume \(only ReadWriteOnce\): .*or a cluster of one node",
        ),
    ],
    ids=[
        *("pending", "starting", "pulled again", "done"),
        *("no image", "never pulled", "no way back", "memory", "evicted", "no such volume"),
    ],
)
def test_what_hinders_the_first_pod_is_told_before_the_tests_begin(
    status: dict[str, Any], events: list[dict[str, Any]], says: str | None
) -> None:
    said = given.hindrance({"status": status}, events, "fast", "ReadWriteMany")
    assert said is None if says is None else re.search(says, str(said)), said
