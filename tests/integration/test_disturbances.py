"""A job on a real API server while the cluster around it does what clusters do: nothing is lost, everything is said."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from datetime import UTC, datetime
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


def test_a_quota_of_gpus_that_is_used_up_is_said_and_waited_for_although_only_pods_are_refused(story: Story) -> None:
    quota: Resource = {"kind": "ResourceQuota", "apiVersion": "v1", "metadata": {"name": "gpus"}}
    made = story.api.create(quota | {"spec": {"hard": {"requests.nvidia.com/gpu": "8"}}}, story.namespace)
    wait_until(lambda: (story.api.refresh(made) or {}).get("status", {}).get("hard"), "the quota to hold")
    story.apply(topology={"nodes": 3, "gpusPerNode": 4})
    (pod,) = story.pods(1, Stage.PREPARE)
    story.end_well(story.kubelet.run(pod))
    assert "2 of 3 pods have been created. A quota" in story.message("WaitingForPods")
    (used,) = story.api.objects("ResourceQuota", story.namespace)
    assert used["status"]["used"] == {"requests.nvidia.com/gpu": "8"}
    story.api.patch(made, {"spec": {"hard": {"requests.nvidia.com/gpu": "12"}}})
    done = story.carry_on()
    assert {stage: story.attempts(done, stage) for stage in STAGES} == {stage: ["succeeded"] for stage in STAGES}


def test_a_webhook_that_does_not_answer_yet_is_waited_for(own_control_plane: ControlPlane, story: Story) -> None:
    with own_control_plane.webhook_down(story.namespace):
        story.apply()
        (pod,) = story.pods(1, Stage.PREPARE)
        story.end_well(story.kubelet.run(pod))
        assert "webhook" in story.message("WaitingForWebhook")
    done = story.carry_on()
    assert story.attempts(done, Stage.TRAIN) == ["succeeded"]


def lose_a_node_while_training(story: Story) -> tuple[str, str]:
    """Three pods train, the second on a node that is then lost, and the others end. Returns that node and that pod."""
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
    return node, lost


LONG = 60.0
"""Seconds that the operator is told to wait for further words: that it does would show on a busy machine too."""


@pytest.mark.parametrize(
    "operator", [{"tuned": {"SETTLE_SECONDS": LONG, "GRACE_MARGIN_SECONDS": LONG}}], indirect=True, ids=[""]
)
def test_a_lost_nodes_attempt_is_concluded_at_once_and_its_pod_is_waited_for(story: Story) -> None:
    node, lost = lose_a_node_while_training(story)
    others_ended = datetime.now(UTC)

    def others_gone() -> bool:
        for pod in story.api.objects("Pod", story.namespace, {"finetune.dev/stage": "train"}):
            if "deletionTimestamp" in pod["metadata"] and pod["metadata"]["name"] != lost:
                story.kubelet.finish_termination(pod)
        return len(story.api.objects("Pod", story.namespace, {"finetune.dev/stage": "train"})) == 1

    wait_until(others_gone, "the pods on nodes that live to be gone")
    told = f"Waiting for pod {lost} on node {node} of train attempt 1 to terminate."
    status = story.wait(lambda status: any(c["message"] == told for c in status["conditions"]), "to wait for the pod")
    (record,) = [a for a in status["attempts"] if a["stage"] == "train"]
    # The lost pod never says how it ended: neither its grace period nor the time that ranks have to name a cause.
    assert (datetime.fromisoformat(record["ended"]) - others_ended).total_seconds() < LONG / 2
    story.kubelet.out_of_service(node)
    done = story.carry_on()
    assert story.attempts(done, Stage.TRAIN) == ["node-lost", "succeeded"]


@pytest.mark.parametrize(
    "operator", [{"values": {"rbac": {"aggregate": False, "clusterReads": True}}}], indirect=True, ids=[""]
)
def test_a_node_that_is_declared_out_of_service_holds_up_nothing_although_its_pod_is_still_there(story: Story) -> None:
    node, lost = lose_a_node_while_training(story)
    story.kubelet.declare_out_of_service(node)
    (tainted,) = [n for n in story.api.objects("Node") if n["metadata"]["name"] == node]
    assert "node.kubernetes.io/out-of-service" in {taint["key"] for taint in tainted["spec"]["taints"]}

    def second_attempt() -> list[Resource]:
        for pod in story.api.objects("Pod", story.namespace, {"finetune.dev/attempt": "1"}):
            if "deletionTimestamp" in pod["metadata"] and pod["metadata"]["name"] != lost:
                story.kubelet.finish_termination(pod)
        return story.api.objects("PyTorchJob", story.namespace, {"finetune.dev/attempt": "2"})

    wait_until(second_attempt, "the second attempt")
    assert story.api.find("Pod", lost, story.namespace), "its node is dead, but nobody has collected it"
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


QUEUE = "kueue.x-k8s.io/queue-name"


@contextlib.contextmanager
def suspended_on_creation(story: Story) -> Iterator[None]:
    """What Kueue's mutating webhook does to whatever carries its queue label: it is created suspended.

    A MutatingAdmissionPolicy stands in for it, so that no moment passes in which the child is not.
    """

    def policy(group: str, plural: str, suspend: str) -> list[Resource]:
        name = f"{plural}-of-{story.namespace}"
        rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [plural]}
        mutation = {
            "patchType": "ApplyConfiguration",
            "applyConfiguration": {"expression": f"Object{{spec: Object.spec{{{suspend}}}}}"},
        }
        spec = {
            "matchConstraints": {
                "resourceRules": [rule],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": story.namespace}},
                "objectSelector": {"matchExpressions": [{"key": QUEUE, "operator": "Exists"}]},
            },
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [mutation],
        }
        api_version = "admissionregistration.k8s.io/v1"
        return [
            {"apiVersion": api_version, "kind": f"MutatingAdmissionPolicy{suffix}", "metadata": {"name": name}, **body}
            for suffix, body in (("", {"spec": spec}), ("Binding", {"spec": {"policyName": name}}))
        ]

    run_policy = "runPolicy: Object.spec.runPolicy{suspend: true}"
    made = [
        story.api.create(manifest)
        for manifest in (
            *policy("kubeflow.org", "pytorchjobs", run_policy),
            *policy("batch", "jobs", "suspend: true"),
        )
    ]
    probe: Resource = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "labels": {QUEUE: "q"}}}
    container = {"name": "a", "image": "a"}
    probe["spec"] = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}

    def holds() -> bool:
        return bool(story.api.apply(probe, story.namespace, dry_run=True)["spec"].get("suspend"))

    try:
        wait_until(holds, "the policy to hold")
        yield
    finally:
        for manifest in made:
            story.api.delete(manifest)


def test_what_kueue_writes_into_a_child_stays_and_the_job_is_queued_until_it_is_admitted(story: Story) -> None:
    """Kueue is played, field by field as its source (v0.15.0) writes:

    - its webhook suspends on creation what carries the label `kueue.x-k8s.io/queue-name`
      (jobframework/defaults.go: ApplyDefaultForSuspend);
    - admission writes `runPolicy.suspend: false` and merges node labels and tolerations of the ResourceFlavor, and
      labels and annotations, into the template of each replica (kubeflowjob_controller.go: RunWithPodSetsInfo,
      podset.go: FromAssignment, Merge);
    - eviction suspends again and restores the template as it was (RestorePodSetsInfo).

    Not played: Workloads, admission checks, topology-aware scheduling with its scheduling gates.
    """
    with suspended_on_creation(story):
        story.apply(podTemplate={"queueName": "team", "labels": {"team": "ml"}})
        (pod,) = story.pods(1, Stage.PREPARE)
        story.end_well(story.kubelet.run(pod))
        status = story.reason("Queued")
        assert status["phase"] == "Queued"
        child = story.api.get("PyTorchJob", f"{NAME}-train-1", story.namespace)
        assert child["metadata"]["labels"][QUEUE] == "team"
        before = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        train = {"finetune.dev/stage": "train"}
        assert not story.api.objects("Pod", story.namespace, train)

        spot = {"key": "spot", "operator": "Exists", "effect": "NoSchedule"}
        admitted = copy.deepcopy(before)
        admitted["metadata"]["labels"] |= {"kueue.x-k8s.io/podset": "worker"}
        admitted["metadata"]["annotations"] = {"kueue.x-k8s.io/workload": "pytorchjob-support-train-1-1a2b3"}
        admitted["spec"]["nodeSelector"] = {"pool": "spot"}
        admitted["spec"]["tolerations"] = [*before["spec"]["tolerations"], spot]
        restored = copy.deepcopy(before)
        restored["metadata"]["labels"] |= {"kueue.x-k8s.io/podset": None}
        restored["metadata"]["annotations"] = {"kueue.x-k8s.io/workload": None}
        restored["spec"]["nodeSelector"] = {"pool": None}
        for template, suspend in ((admitted, False), (restored, True), (admitted, False)):
            worker = {"pytorchReplicaSpecs": {"Worker": {"template": template}}}
            story.api.patch(child, {"spec": {"runPolicy": {"suspend": suspend}} | worker})
            if suspend:
                for pod in story.pods_terminating():
                    story.kubelet.finish_termination(pod, failing("preempted", 0))
                wait_until(lambda: not story.api.objects("Pod", story.namespace, train), "the pods to be taken away")
                story.reason("Queued")
                continue
            for pod in [story.kubelet.run(pod) for pod in story.pods(3, Stage.TRAIN)]:
                assert pod["spec"]["nodeSelector"] == {"pool": "spot"}
                assert spot in pod["spec"]["tolerations"]
                assert pod["metadata"]["labels"]["team"] == "ml"
            story.reason("Training")
        story.end_well(*story.pods(3, Stage.TRAIN))
        wait_until(lambda: story.api.find("Job", f"{NAME}-evaluate-1", story.namespace), "Evaluate to be made")
        story.reason("Queued")
        story.api.patch(story.api.get("Job", f"{NAME}-evaluate-1", story.namespace), {"spec": {"suspend": False}})
        done = story.carry_on()
    assert {stage: story.attempts(done, stage) for stage in STAGES} == {stage: ["succeeded"] for stage in STAGES}


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
