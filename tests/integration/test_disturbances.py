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
from .harness.job_scenario import NAME, JobScenario, failing
from .harness.operator import OperatorProcess, is_true
from .harness.processes import wait_until
from .harness.tcp_proxy import TcpProxy


def test_a_quota_that_is_used_up_is_said_and_waited_for(scenario: JobScenario) -> None:
    quota: Resource = {"kind": "ResourceQuota", "apiVersion": "v1", "metadata": {"name": "jobs"}}
    made = scenario.api.create(quota | {"spec": {"hard": {"count/jobs.batch": "0"}}}, scenario.namespace)
    wait_until(lambda: (scenario.api.refresh(made) or {}).get("status", {}).get("hard"), "the quota to hold")
    scenario.apply()
    assert "count/jobs.batch" in scenario.message("WaitingForQuota")
    scenario.api.delete(made)
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.PREPARE) == ["succeeded"]


def test_a_quota_of_gpus_that_is_used_up_is_said_and_waited_for_although_only_pods_are_refused(
    scenario: JobScenario,
) -> None:
    quota: Resource = {"kind": "ResourceQuota", "apiVersion": "v1", "metadata": {"name": "gpus"}}
    made = scenario.api.create(quota | {"spec": {"hard": {"requests.nvidia.com/gpu": "8"}}}, scenario.namespace)
    wait_until(lambda: (scenario.api.refresh(made) or {}).get("status", {}).get("hard"), "the quota to hold")
    scenario.apply(topology={"nodes": 3, "gpusPerNode": 4})
    (pod,) = scenario.pods(1, Stage.PREPARE)
    scenario.end_well(scenario.kubelet.run(pod))
    assert "2 of 3 pods have been created. A quota" in scenario.message("WaitingForPods")
    (used,) = scenario.api.objects("ResourceQuota", scenario.namespace)
    assert used["status"]["used"] == {"requests.nvidia.com/gpu": "8"}
    scenario.api.patch(made, {"spec": {"hard": {"requests.nvidia.com/gpu": "12"}}})
    done = scenario.carry_on()
    assert {stage: scenario.attempts(done, stage) for stage in STAGES} == {stage: ["succeeded"] for stage in STAGES}


def test_a_webhook_that_does_not_answer_yet_is_waited_for(
    own_control_plane: ControlPlane, scenario: JobScenario
) -> None:
    with own_control_plane.webhook_down(scenario.namespace):
        scenario.apply()
        (pod,) = scenario.pods(1, Stage.PREPARE)
        scenario.end_well(scenario.kubelet.run(pod))
        assert "webhook" in scenario.message("WaitingForWebhook")
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.TRAIN) == ["succeeded"]


def lose_a_node_while_training(scenario: JobScenario) -> tuple[str, str]:
    """Three pods train, the second on a node that is then lost, and the others end. Returns that node and that pod."""
    node = f"node-of-{scenario.namespace}"
    scenario.kubelet.add_node(node)
    scenario.apply(retry={"limit": 0})
    (pod,) = scenario.pods(1, Stage.PREPARE)
    scenario.end_well(scenario.kubelet.run(pod))
    first, second, third = scenario.pods(3, Stage.TRAIN)
    lost = scenario.kubelet.run(second, node)["metadata"]["name"]
    others = [scenario.kubelet.run(pod) for pod in (first, third)]
    scenario.reason("Training")
    scenario.kubelet.lose_node(node)
    for pod in others:
        scenario.kubelet.end(pod, failing("peer", 0))
    return node, lost


LONG = 60.0
"""Seconds that the operator is told to wait for further words: that it does would show on a busy machine too."""


@pytest.mark.parametrize(
    "operator", [{"tuned": {"SETTLE_SECONDS": LONG, "GRACE_MARGIN_SECONDS": LONG}}], indirect=True, ids=[""]
)
def test_a_lost_nodes_attempt_is_concluded_at_once_and_its_pod_is_waited_for(scenario: JobScenario) -> None:
    node, lost = lose_a_node_while_training(scenario)
    others_ended = datetime.now(UTC)

    def others_gone() -> bool:
        for pod in scenario.api.objects("Pod", scenario.namespace, {"finetune.dev/stage": "train"}):
            if "deletionTimestamp" in pod["metadata"] and pod["metadata"]["name"] != lost:
                scenario.kubelet.finish_termination(pod)
        return len(scenario.api.objects("Pod", scenario.namespace, {"finetune.dev/stage": "train"})) == 1

    wait_until(others_gone, "the pods on nodes that live to be gone")
    told = f"Waiting for pod {lost} on node {node} of train attempt 1 to terminate."
    status = scenario.wait(
        lambda status: any(c["message"] == told for c in status["conditions"]), "to wait for the pod"
    )
    (record,) = [a for a in status["attempts"] if a["stage"] == "train"]
    # The lost pod never says how it ended: neither its grace period nor the time that ranks have to name a cause.
    assert (datetime.fromisoformat(record["ended"]) - others_ended).total_seconds() < LONG / 2
    scenario.kubelet.out_of_service(node)
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.TRAIN) == ["node-lost", "succeeded"]


@pytest.mark.parametrize(
    "operator", [{"values": {"rbac": {"aggregate": False, "clusterReads": True}}}], indirect=True, ids=[""]
)
def test_a_node_that_is_declared_out_of_service_holds_up_nothing_although_its_pod_is_still_there(
    scenario: JobScenario,
) -> None:
    node, lost = lose_a_node_while_training(scenario)
    scenario.kubelet.declare_out_of_service(node)
    (tainted,) = [n for n in scenario.api.objects("Node") if n["metadata"]["name"] == node]
    assert "node.kubernetes.io/out-of-service" in {taint["key"] for taint in tainted["spec"]["taints"]}

    def second_attempt() -> list[Resource]:
        for pod in scenario.api.objects("Pod", scenario.namespace, {"finetune.dev/attempt": "1"}):
            if "deletionTimestamp" in pod["metadata"] and pod["metadata"]["name"] != lost:
                scenario.kubelet.finish_termination(pod)
        return scenario.api.objects("PyTorchJob", scenario.namespace, {"finetune.dev/attempt": "2"})

    wait_until(second_attempt, "the second attempt")
    assert scenario.api.find("Pod", lost, scenario.namespace), "its node is dead, but nobody has collected it"
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.TRAIN) == ["node-lost", "succeeded"]


def test_a_gang_that_never_becomes_whole_is_tried_again_without_counting(scenario: JobScenario) -> None:
    scenario.apply(retry={"limit": 0}, timeouts={"startup": "1m"})
    (pod,) = scenario.pods(1, Stage.PREPARE)
    scenario.end_well(scenario.kubelet.run(pod))
    first, second, third = scenario.pods(3, Stage.TRAIN)
    scenario.kubelet.unschedulable(third)
    assert third["metadata"]["name"] in scenario.message("WaitingForPods")
    for pod in [scenario.kubelet.run(pod) for pod in (first, second)]:
        has_run_for_long(scenario, pod)
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.TRAIN) == ["partial-gang", "succeeded"]
    (record, _) = [a for a in done["attempts"] if a["stage"] == "train"]
    assert "2 of 3 pods" in record["message"]
    assert not record.get("counted")


def has_run_for_long(scenario: JobScenario, pod: Resource) -> None:
    """Move the start of a pod's containers back beyond any time-out of the test's jobs."""
    statuses = copy.deepcopy(pod["status"]["containerStatuses"])
    statuses[0]["state"] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    scenario.api.patch(pod, {"status": {"containerStatuses": statuses}}, "status")


QUEUE = "kueue.x-k8s.io/queue-name"


@contextlib.contextmanager
def suspended_on_creation(scenario: JobScenario) -> Iterator[None]:
    """What Kueue's mutating webhook does to whatever carries its queue label: it is created suspended.

    A MutatingAdmissionPolicy stands in for it, so that no moment passes in which the child is not.
    """

    def policy(group: str, plural: str, suspend: str) -> list[Resource]:
        name = f"{plural}-of-{scenario.namespace}"
        rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [plural]}
        mutation = {
            "patchType": "ApplyConfiguration",
            "applyConfiguration": {"expression": f"Object{{spec: Object.spec{{{suspend}}}}}"},
        }
        spec = {
            "matchConstraints": {
                "resourceRules": [rule],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": scenario.namespace}},
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
        scenario.api.create(manifest)
        for manifest in (
            *policy("kubeflow.org", "pytorchjobs", run_policy),
            *policy("batch", "jobs", "suspend: true"),
        )
    ]
    probe: Resource = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "labels": {QUEUE: "q"}}}
    container = {"name": "a", "image": "a"}
    probe["spec"] = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}

    def holds() -> bool:
        return bool(scenario.api.apply(probe, scenario.namespace, dry_run=True)["spec"].get("suspend"))

    try:
        wait_until(holds, "the policy to hold")
        yield
    finally:
        for manifest in made:
            scenario.api.delete(manifest)


def test_what_kueue_writes_into_a_child_stays_and_the_job_is_queued_until_it_is_admitted(scenario: JobScenario) -> None:
    """Kueue is played, field by field as its source (v0.15.0) writes:

    - its webhook suspends on creation what carries the label `kueue.x-k8s.io/queue-name`
      (jobframework/defaults.go: ApplyDefaultForSuspend);
    - admission writes `runPolicy.suspend: false` and merges node labels and tolerations of the ResourceFlavor, and
      labels and annotations, into the template of each replica (kubeflowjob_controller.go: RunWithPodSetsInfo,
      podset.go: FromAssignment, Merge);
    - eviction suspends again and restores the template as it was (RestorePodSetsInfo).

    Not played: Workloads, admission checks, topology-aware scheduling with its scheduling gates.
    """
    with suspended_on_creation(scenario):
        scenario.apply(podTemplate={"queueName": "team", "labels": {"team": "ml"}})
        (pod,) = scenario.pods(1, Stage.PREPARE)
        scenario.end_well(scenario.kubelet.run(pod))
        status = scenario.reason("Queued")
        assert status["phase"] == "Queued"
        child = scenario.api.get("PyTorchJob", f"{NAME}-train-1", scenario.namespace)
        assert child["metadata"]["labels"][QUEUE] == "team"
        before = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        train = {"finetune.dev/stage": "train"}
        assert not scenario.api.objects("Pod", scenario.namespace, train)

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
            scenario.api.patch(child, {"spec": {"runPolicy": {"suspend": suspend}} | worker})
            if suspend:
                for pod in scenario.pods_terminating():
                    scenario.kubelet.finish_termination(pod, failing("preempted", 0))
                wait_until(
                    lambda: not scenario.api.objects("Pod", scenario.namespace, train), "the pods to be taken away"
                )
                scenario.reason("Queued")
                continue
            for pod in [scenario.kubelet.run(pod) for pod in scenario.pods(3, Stage.TRAIN)]:
                assert pod["spec"]["nodeSelector"] == {"pool": "spot"}
                assert spot in pod["spec"]["tolerations"]
                assert pod["metadata"]["labels"]["team"] == "ml"
            scenario.reason("Training")
        scenario.end_well(*scenario.pods(3, Stage.TRAIN))
        wait_until(lambda: scenario.api.find("Job", f"{NAME}-evaluate-1", scenario.namespace), "Evaluate to be made")
        scenario.reason("Queued")
        scenario.api.patch(
            scenario.api.get("Job", f"{NAME}-evaluate-1", scenario.namespace), {"spec": {"suspend": False}}
        )
        done = scenario.carry_on()
    assert {stage: scenario.attempts(done, stage) for stage in STAGES} == {stage: ["succeeded"] for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_any_stage_is_suspended_and_goes_on_as_its_next_attempt(scenario: JobScenario, stage: Stage) -> None:
    scenario.apply(retry={"limit": 0})
    scenario.until(stage)
    scenario.patch({"spec": {"suspend": True}})
    for pod in scenario.pods_terminating(stage):
        scenario.kubelet.finish_termination(pod, failing("preempted", 0))
    status = scenario.wait(is_true("Suspended"), "Suspended")
    assert status["phase"] == "Suspended"
    scenario.patch({"spec": {"suspend": False}})
    done = scenario.carry_on()
    expected = {each: ["suspended", "succeeded"] if each is stage else ["succeeded"] for each in STAGES}
    assert {each: scenario.attempts(done, each) for each in STAGES} == expected


def belongings(scenario: JobScenario) -> list[str]:
    """What there is of the job in its namespace, but for the claim."""
    kinds = ("Pod", "Job", "PyTorchJob", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy")
    return [kind for kind in kinds if scenario.api.objects(kind, scenario.namespace, {"finetune.dev/job": NAME})]


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_deleted_in_any_stage_leaves_its_kept_claim_and_nothing_that_runs(
    scenario: JobScenario, stage: Stage
) -> None:
    made = scenario.apply()
    scenario.until(stage)
    scenario.api.delete(made)
    assert scenario.api.refresh(made) is None
    with scenario.kubelet.playing(scenario.namespace, lambda _: None):
        wait_until(lambda: not belongings(scenario), "everything that the job owned to be gone", 60)
    claims = {claim["metadata"]["name"] for claim in scenario.api.objects("PersistentVolumeClaim", scenario.namespace)}
    assert claims == {"finetune-cache", f"{NAME}-run"}


def test_the_crd_is_upgraded_under_a_running_job(control_plane: ControlPlane, scenario: JobScenario) -> None:
    scenario.apply()
    pods = scenario.until_train()
    scenario.reason("Training")
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
        job = scenario.api.get("FineTuneJob", NAME, scenario.namespace)
        scenario.api.patch(job, {"status": {"ofALaterVersion": "x"}}, "status")
        scenario.end_well(*pods)
        done = scenario.carry_on()
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
            scenario = JobScenario(control_plane, namespace, kubelet)
            scenario.apply()
            pods = scenario.until_train()
            scenario.reason("Training")
            second.start()
            wait_until(lambda: second.get("/readyz", second.metrics_port)[0] == 200, "the second replica to be ready")
            wire.cut()
            assert cut_off.ends() == 1
            assert "Lease" in cut_off.words()
            scenario.end_well(*pods)
            done = scenario.carry_on()
            assert [a["outcome"] for a in done["attempts"]] == ["succeeded"] * 4
        finally:
            cut_off.kill()
            second.kill()
