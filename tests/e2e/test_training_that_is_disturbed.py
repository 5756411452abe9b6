"""What happens to a training on real pods when a pod, a process or the memory goes; and that nothing is lost by it.

A start of three pods is what costs here, so disturbances that a job survives follow each other in one job, and what
takes its time goes on beside other tests.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.node import FAKE_GPUS
from tests.integration.harness.api import ApiError
from tests.integration.harness.processes import wait_until

from finetune_api.base import Stage

from .clusters import JOB, Cluster, OwnNode
from .conftest import Furnish
from .tenant import AFTER_EVERY_STEP, LABEL_UID, TRAINING, Tenant, condition_of, is_true

pytestmark = pytest.mark.timeout(1200)
GPU = "nvidia.com/gpu"


def train_attempts(tenant: Tenant) -> list[dict[str, Any]]:
    return [a for a in tenant.status()["attempts"] if a["stage"] == Stage.TRAIN]


def test_a_pod_deleted_a_rank_killed_and_a_job_suspended_cost_no_step_and_one_attempt(
    tenant: Tenant, undisturbed: dict[int, float]
) -> None:
    tenant.apply(publish=None, checkpoint=AFTER_EVERY_STEP)
    tenant.trained_to(6)
    tenant.kubectl("delete", "pod", f"{JOB}-train-1-worker-1", "--wait=false")
    tenant.wait(tenant.attempt_is("running", 2), "a second attempt")
    deleted = train_attempts(tenant)[0]
    assert deleted["reason"] in ("preempted", "deleted")

    tenant.trained_to(14, attempt=2)
    tenant.signal(tenant.pods(attempt=2)[2], signal.SIGKILL)
    tenant.wait(tenant.attempt_is("running", 3), "a third attempt")
    killed = train_attempts(tenant)[1]
    assert "SIGKILL" in killed["message"]
    assert killed["rank"] == 2

    tenant.trained_to(22, attempt=3)
    tenant.patch({"spec": {"suspend": True}})
    tenant.wait(lambda status: is_true(status, "Suspended"), "Suspended", 120)
    assert tenant.pods() == []
    tenant.patch({"spec": {"suspend": False}})

    tenant.complete()
    assert tenant.ended() == [(deleted["reason"], False), ("crash", True), ("suspended", False), ("succeeded", False)]
    resumed = [a["resumedFromStep"] for a in train_attempts(tenant)[1:]]
    assert all(step >= least for step, least in zip(resumed, (6, 13, 22), strict=True))
    assert tenant.losses() == undisturbed


@dataclass
class Stopped:
    """A job whose volume was full, that a retry took on, and one of whose ranks has been stopped since."""

    tenant: Tenant
    full: dict[str, Any]
    """Its status when the volume was full."""


@pytest.fixture(scope="module")
def stopped(request: pytest.FixtureRequest, own_node: OwnNode, furnish: Furnish) -> Iterator[Stopped]:
    """The peers notice after a minute, and its pod bears its grace: meanwhile there are other tests."""
    failed_before = request.session.testsfailed
    with (
        furnish("full-then-stopped", lambda: request.session.testsfailed > failed_before) as tenant,
        little_room(own_node.volume(tenant.namespace)) as volume,
    ):
        tenant.apply(publish=None, checkpoint=AFTER_EVERY_STEP, timeouts={"startup": "5m", "hang": "1m"})
        tenant.trained_to(6)
        filler = volume / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, check=False)
        full = tenant.failed()
        filler.unlink()
        tenant.patch({"metadata": {"annotations": {"finetune.dev/retry": "1"}}})
        wait_until(lambda: tenant.attempt_is("running", 2)(tenant.status()), "a second attempt", 60)
        tenant.trained_to(14, attempt=2)
        tenant.signal(tenant.pods(attempt=2)[1], signal.SIGSTOP)
        yield Stopped(tenant, full)


@contextlib.contextmanager
def little_room(folder: Path) -> Iterator[Path]:
    """A volume with room for 64 MB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "finetune-test", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_volume_ends_a_job_with_a_sentence(stopped: Stopped) -> None:
    (train,) = [a for a in stopped.full["attempts"] if a["stage"] == Stage.TRAIN]
    assert (train["reason"], train["counted"]) == ("storage-full", False)
    assert "storage.run.size" in condition_of(stopped.full, "Failed")["message"]


def test_a_pod_at_its_memory_limit_is_told_from_a_crash_and_the_limit_is_named(tenant: Tenant) -> None:
    limit = {"resources": {"limits": {"memory": "256Mi"}}}
    tenant.apply(publish=None, podTemplate=limit, retry={"limit": 0}, topology={"nodes": 1, "gpusPerNode": 0})
    tenant.failed()
    assert tenant.ended() == [("host-oom", True)]
    (train,) = train_attempts(tenant)
    assert "256Mi" in train["message"]
    assert "podTemplate.resources.limits.memory" in train["message"]


@pytest.fixture
def gpu_node(cluster: Cluster) -> Iterator[str]:
    """The name of a node that pretends to have GPUs."""
    node = {"kind": "Node", "metadata": {"name": cluster.node}}

    def allocatable() -> str | None:
        found: str | None = cluster.api.get("Node", cluster.node)["status"]["allocatable"].get(GPU)
        return found

    def pretended() -> bool:
        if allocatable() == str(FAKE_GPUS):
            return True
        cluster.api.patch(node, _gpus(str(FAKE_GPUS)), "status")  # a kubelet forgets it as it starts
        return False

    if not cluster.owned and allocatable() is not None:
        pytest.skip(f"The node {cluster.node} of the given cluster has GPUs of its own.")
    try:
        wait_until(pretended, f"{FAKE_GPUS} pretended GPUs")
    except ApiError as error:
        if cluster.owned:
            raise
        pytest.skip(f"The node {cluster.node} of the given cluster may not pretend to have GPUs: {error.message}")
    yield cluster.node
    if not cluster.owned:
        cluster.api.patch(node, _gpus(None), "status")


def _gpus(count: str | None) -> dict[str, Any]:
    return {"status": {"capacity": {GPU: count}}}


def test_pods_are_scheduled_for_their_gpus_and_say_so_where_cuda_finds_none(gpu_node: str, tenant: Tenant) -> None:
    tenant.apply(publish=None, retry={"limit": 0}, topology={"nodes": 1, "gpusPerNode": 2})
    tenant.failed()
    assert tenant.ended() == [("crash", True)]
    (train,) = train_attempts(tenant)
    assert "2 GPUs (topology.gpusPerNode), but CUDA finds 0 (Found no NVIDIA driver" in train["message"]
    (pod,) = tenant.pods()
    assert pod["spec"]["nodeName"] == gpu_node
    assert pod["spec"]["containers"][0]["resources"]["requests"][GPU] == "2"


def test_a_job_deleted_and_applied_again_saves_keeps_its_volume_and_starts_afresh_after_the_old_pods(
    tenant: Tenant,
) -> None:
    two = {"nodes": 2, "gpusPerNode": 0}
    tenant.apply(publish=None, checkpoint=AFTER_EVERY_STEP, topology=two)
    tenant.trained_to(1)
    before, old = tenant.run, tenant.job()["metadata"]["uid"]
    pods = {pod["metadata"]["uid"] for pod in tenant.pods()}
    tenant.kubectl("delete", "finetunejob", JOB, "--wait=false")
    wait_until(lambda: tenant.api.find("FineTuneJob", JOB, tenant.namespace) is None, "the old job to go")
    tenant.apply(publish=None, topology=two, training=TRAINING | {"epochs": 1})

    met: list[bool] = []

    def left() -> bool:
        there = [pod["metadata"] for pod in tenant.api.objects("Pod", tenant.namespace)]
        there = [metadata for metadata in there if LABEL_UID in metadata.get("labels", {})]
        met.append(len({metadata["labels"][LABEL_UID] for metadata in there}) > 1)
        return not any(metadata["uid"] in pods for metadata in there)

    wait_until(left, "the old pods to end within their grace", 60)
    assert any(name.startswith("step-") for name in tenant.files("checkpoints", run=before))
    claim = tenant.api.get("PersistentVolumeClaim", f"{JOB}-run", tenant.namespace)
    assert "deletionTimestamp" not in claim["metadata"]
    tenant.wait(lambda status: bool(left()) and tenant.attempt_is("succeeded", 1)(status), "the new job to be trained")
    assert not any(met), "pods of both jobs ran at once"
    assert tenant.job()["metadata"]["uid"] != old
    assert tenant.run != before
    assert sorted(tenant.losses()) == list(range(1, 19))


def test_a_retry_goes_on_after_a_full_volume_and_a_stopped_rank_is_named_with_its_peers_stacks(
    stopped: Stopped, undisturbed: dict[int, float]
) -> None:
    tenant = stopped.tenant
    tenant.wait(tenant.attempt_is("succeeded", 3), "the third attempt to succeed", 600)
    assert tenant.ended() == [("storage-full", False), ("hang", True), ("succeeded", False)]
    assert "rank 1" in train_attempts(tenant)[1]["message"].lower()
    for rank in (0, 2):
        assert "train" in tenant.read(f"logs/train-2/stacks-rank{rank}.txt")
    assert tenant.losses() == undisturbed
