"""A job on a real API server while the cluster around it does what clusters do: nothing is lost, everything is said."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from finetune_api.base import STAGES, Stage
from finetune_api.crd import definition

from .harness.api import Resource
from .harness.control_plane import ControlPlane
from .harness.fake_kubelet import FakeKubelet
from .harness.operator import OperatorProcess, is_true
from .harness.processes import wait_until
from .harness.story import NAME, Story, failing
from .harness.tcp_proxy import TcpProxy


def test_a_quota_that_is_used_up_is_said_and_waited_for(story: Story) -> None:
    quota: Resource = {"kind": "ResourceQuota", "apiVersion": "v1", "metadata": {"name": "jobs"}}
    made = story.api.create(quota | {"spec": {"hard": {"count/jobs.batch": "0"}}}, story.namespace)
    wait_until(lambda: (story.api.refresh(made) or {}).get("status", {}).get("hard"), "the quota to hold")
    story.apply()
    assert "count/jobs.batch" in story.message("WaitingForQuota")
    story.api.delete(made)
    done = story.carry_on()
    assert story.attempts(done, Stage.PREPARE) == ["succeeded"]


def test_a_webhook_that_does_not_answer_yet_is_waited_for(own_control_plane: ControlPlane, story: Story) -> None:
    with own_control_plane.webhook_down(story.namespace):
        story.apply()
        (pod,) = story.pods(1, Stage.PREPARE)
        story.end_well(story.kubelet.run(pod))
        assert "webhook" in story.message("WaitingForWebhook")
    done = story.carry_on()
    assert story.attempts(done, Stage.TRAIN) == ["succeeded"]


def test_a_lost_node_holds_up_the_next_attempt_until_it_is_out_of_service(story: Story) -> None:
    node = f"node-of-{story.namespace}"
    story.kubelet.add_node(node)
    story.apply(retry={"limit": 0})
    (pod,) = story.pods(1, Stage.PREPARE)
    story.end_well(story.kubelet.run(pod))
    first, second, third = story.pods(3, Stage.TRAIN)
    lost = story.kubelet.run(second, node)["metadata"]["name"]
    others = [story.kubelet.run(pod) for pod in (first, third)]
    story.reason("Training")
    story.kubelet.lose_node(node)
    for pod in others:
        story.kubelet.end(pod, failing("peer", 0))

    def others_gone() -> bool:
        for pod in story.api.objects("Pod", story.namespace, {"finetune.dev/stage": "train"}):
            if "deletionTimestamp" in pod["metadata"] and pod["metadata"]["name"] != lost:
                story.kubelet.finish_termination(pod)
        return len(story.api.objects("Pod", story.namespace, {"finetune.dev/stage": "train"})) == 1

    # The lost pod never says how it ended: its grace period is waited for.
    wait_until(others_gone, "the pods on nodes that live to be gone", 90)
    told = f"Waits until pod {lost} on node {node} of train attempt 1 is gone."
    story.wait(lambda status: any(c["message"] == told for c in status["conditions"]), "waiting for the lost pod")
    story.kubelet.out_of_service(node)
    done = story.carry_on()
    assert story.attempts(done, Stage.TRAIN) == ["node-lost", "succeeded"]


def test_a_gang_that_never_becomes_whole_is_tried_again_without_counting(story: Story) -> None:
    story.apply(retry={"limit": 0}, timeouts={"startup": "1m"})
    (pod,) = story.pods(1, Stage.PREPARE)
    story.end_well(story.kubelet.run(pod))
    first, second, third = story.pods(3, Stage.TRAIN)
    story.kubelet.unschedulable(third)
    assert third["metadata"]["name"] in story.message("WaitingForPods")
    for pod in [story.kubelet.run(pod) for pod in (first, second)]:
        has_run_for_long(story, pod)
    done = story.carry_on()
    assert story.attempts(done, Stage.TRAIN) == ["partial-gang", "succeeded"]
    (record, _) = [a for a in done["attempts"] if a["stage"] == "train"]
    assert "2 of 3 pods" in record["message"]
    assert not record.get("counted")


def has_run_for_long(story: Story, pod: Resource) -> None:
    """Move the start of a pod's containers back beyond any time-out of the test's jobs."""
    statuses = copy.deepcopy(pod["status"]["containerStatuses"])
    statuses[0]["state"] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    story.api.patch(pod, {"status": {"containerStatuses": statuses}}, "status")


def test_what_a_queue_writes_into_a_child_stays_and_the_job_is_queued(story: Story) -> None:
    story.apply()
    (pod,) = story.pods(1, Stage.PREPARE)
    story.end_well(story.kubelet.run(pod))
    story.pods(3, Stage.TRAIN)
    child = story.api.get("PyTorchJob", f"{NAME}-train-1", story.namespace)
    placed = {"pytorchReplicaSpecs": {"Worker": {"template": {"spec": {"nodeSelector": {"pool": "spot"}}}}}}
    story.api.patch(child, {"spec": {"runPolicy": {"suspend": True}} | placed})
    status = story.reason("Queued")
    assert status["phase"] == "Queued"
    train = {"finetune.dev/stage": "train"}
    wait_until(lambda: not story.api.objects("Pod", story.namespace, train), "the queue to take the pods away")
    suspended = story.api.get("PyTorchJob", f"{NAME}-train-1", story.namespace)
    assert suspended["spec"]["runPolicy"]["suspend"] is True
    story.api.patch(child, {"spec": {"runPolicy": {"suspend": False}}})
    assert {pod["spec"]["nodeSelector"]["pool"] for pod in story.pods(3, Stage.TRAIN)} == {"spot"}
    done = story.carry_on()
    assert story.attempts(done, Stage.TRAIN) == ["succeeded"]


@pytest.mark.parametrize("stage", STAGES)
def test_any_stage_is_suspended_and_goes_on_as_its_next_attempt(story: Story, stage: Stage) -> None:
    story.apply(retry={"limit": 0})
    story.until(stage)
    story.patch({"spec": {"suspend": True}})
    for pod in story.pods_terminating(stage):
        story.kubelet.finish_termination(pod, failing("preempted", 0))
    status = story.wait(is_true("Suspended"), "Suspended")
    assert status["phase"] == "Suspended"
    story.patch({"spec": {"suspend": False}})
    done = story.carry_on()
    expected = {each: ["suspended", "succeeded"] if each is stage else ["succeeded"] for each in STAGES}
    assert {each: story.attempts(done, each) for each in STAGES} == expected


def belongings(story: Story) -> list[str]:
    """What there is of the job in its namespace, but for the claim."""
    kinds = ("Pod", "Job", "PyTorchJob", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy")
    return [kind for kind in kinds if story.api.objects(kind, story.namespace, {"finetune.dev/job": NAME})]


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_deleted_in_any_stage_leaves_its_kept_claim_and_nothing_that_runs(story: Story, stage: Stage) -> None:
    made = story.apply()
    story.until(stage)
    story.api.delete(made)
    assert story.api.refresh(made) is None
    with story.kubelet.playing(story.namespace, lambda _: None):
        wait_until(lambda: not belongings(story), "everything that the job owned to be gone", 60)
    claims = {claim["metadata"]["name"] for claim in story.api.objects("PersistentVolumeClaim", story.namespace)}
    assert claims == {"finetune-cache", f"{NAME}-run"}


def test_the_crd_is_upgraded_under_a_running_job(control_plane: ControlPlane, story: Story) -> None:
    story.apply()
    pods = story.until_train()
    story.reason("Training")
    newer = definition()
    (version,) = newer["spec"]["versions"]
    status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    status["ofALaterVersion"] = {"type": "string"}
    version["additionalPrinterColumns"].append(
        {"name": "Later", "type": "string", "jsonPath": ".status.ofALaterVersion"}
    )
    control_plane.apply(newer)
    try:
        # What a later operator wrote is no reason for this one to stumble.
        job = story.api.get("FineTuneJob", NAME, story.namespace)
        story.api.patch(job, {"status": {"ofALaterVersion": "x"}}, "status")
        story.end_well(*pods)
        done = story.carry_on()
        assert [a["outcome"] for a in done["attempts"]] == ["succeeded"] * 4
    finally:
        control_plane.apply(definition())


def test_a_leader_that_is_cut_off_ends_and_the_second_takes_over(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet, tmp_path: Path, operator: OperatorProcess
) -> None:
    operator.stop()
    with TcpProxy(control_plane.server) as wire:
        cut_off = operator.twin(control_plane.kubeconfig_for(operator.account, operator.ops, wire.url)).start()
        second = operator.twin()
        try:
            story = Story(control_plane, namespace, kubelet)
            story.apply()
            pods = story.until_train()
            story.reason("Training")
            second.start()
            wait_until(lambda: second.get("/readyz", second.health_port)[0] == 200, "the second replica to be ready")
            wire.cut()
            assert cut_off.ends() == 1
            assert "Lease" in cut_off.words()
            story.end_well(*pods)
            done = story.carry_on()
            assert [a["outcome"] for a in done["attempts"]] == ["succeeded"] * 4
        finally:
            cut_off.kill()
            second.kill()
