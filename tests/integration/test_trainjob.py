"""TrainJobs instead of PyTorchJobs: the same job, carried by the real Kubeflow Trainer v2 and the real JobSet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.base import Stage

from .harness import binaries
from .harness.api import Resource
from .harness.control_plane import ControlPlane
from .harness.helm import Helm
from .harness.job_scenario import NAME, JobScenario, failing
from .harness.kubeflow_trainer import KubeflowTrainer
from .harness.operator import OperatorProcess, is_true, rights
from .harness.processes import wait_until

GROUP = "trainer.kubeflow.org"


@pytest.fixture(scope="module")
def kubeflow_trainer(control_plane: ControlPlane) -> Iterator[None]:
    """TrainJobs are served and worked on."""
    if not control_plane.owned:
        pytest.skip("Kubeflow Trainer and JobSet are started beside a control plane of the tests' own.")
    try:
        for name in ("helm", "jobset", "kubeflow-trainer"):
            binaries.ensure(name)
    except binaries.BinaryUnavailableError as problem:
        pytest.skip(str(problem))
    with KubeflowTrainer(control_plane):
        yield


@pytest.fixture
def operator(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, fine_tune_jobs: None, kubeflow_trainer: None
) -> Iterator[OperatorProcess]:
    """Our operator with the backend `trainjob`, under the rights that the chart then gives it."""
    ops = control_plane.create_namespace("ops")
    helm = Helm(tmp_path, control_plane.kubeconfig)
    values, tuned = {"backend": "trainjob"}, {"GRACE_MARGIN_SECONDS": 5.0}
    running = OperatorProcess(control_plane, helm, namespace, ops, values=values, tuned=tuned).start()
    yield running
    running.kill()
    control_plane.delete_namespace(ops)


def variables(pod: Resource) -> dict[str, object]:
    """Variables of a pod's container, by value or by where the value is from."""
    given = pod["spec"]["containers"][0]["env"]
    return {v["name"]: v.get("value") or v["valueFrom"]["fieldRef"]["fieldPath"] for v in given}


def test_a_job_is_carried_to_complete_by_trainjobs_with_the_rights_that_the_chart_gives(
    control_plane: ControlPlane, scenario: JobScenario, operator: OperatorProcess
) -> None:
    scenario.apply(podTemplate={"resources": {"requests": {"cpu": "2"}}})
    pods = scenario.until_train()
    ranks = {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: pod for pod in pods}
    assert sorted(ranks) == ["0", "1", "2"]
    for pod in pods:
        told = variables(pod)
        assert (told["PET_NNODES"], told["PET_NPROC_PER_NODE"]) == ("3", "4")
        assert told["PET_NODE_RANK"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        assert told["PET_MASTER_ADDR"] == f"{NAME}-train-1-node-0-0.{NAME}-train-1"
        assert pod["spec"]["hostname"] + "." + pod["spec"]["subdomain"] == str(told["PET_MASTER_ADDR"]).replace(
            "-0-0.", f"-0-{pod['metadata']['labels']['batch.kubernetes.io/job-completion-index']}."
        )
        assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    done = scenario.carry_on()
    assert [a["outcome"] for a in done["attempts"]] == ["succeeded"] * 4
    assert not scenario.api.objects("PyTorchJob", scenario.namespace)
    user = f"system:serviceaccount:{operator.ops}:{operator.account}"
    granted = rights(scenario.api.get("Role", operator.account, scenario.namespace))
    granted |= rights(scenario.api.get("Role", f"{operator.account}-lease", operator.ops))
    used = {right for right in control_plane.permissions_used(user) if right[0] == GROUP}
    assert used <= granted
    assert {(GROUP, "trainjobs", "create"), (GROUP, "trainingruntimes", "create")} <= used
    assert not [right for right in granted if right[0] == "kubeflow.org"]


def test_the_root_cause_on_another_rank_is_recorded_and_the_next_attempt_follows(scenario: JobScenario) -> None:
    scenario.apply()
    first, second, third = scenario.until_train()
    scenario.reason("Training")
    scenario.kubelet.end(first, failing("peer", 0))
    scenario.kubelet.end(third, failing("cuda-oom", 2))
    assert not [p for p in scenario.api.objects("Pod", scenario.namespace) if "deletionTimestamp" in p["metadata"]]
    scenario.kubelet.end(second, failing("peer", 1))
    status = scenario.wait(lambda s: any(a.get("reason") == "cuda-oom" for a in s["attempts"]), "recorded")
    (record,) = [a for a in status["attempts"] if (a["stage"], a["number"]) == ("train", 1)]
    assert (record["rank"], record["counted"]) == (2, True)
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.TRAIN) == ["cuda-oom", "succeeded"]
    kept = {kind: [o["metadata"]["name"] for o in scenario.api.objects(kind, scenario.namespace)] for kind in KINDS}
    assert kept == {kind: [f"{NAME}-train-2"] for kind in KINDS}


KINDS = ("TrainJob", "TrainingRuntime", "JobSet")


def test_a_pod_that_is_preempted_is_waited_for_and_not_made_again(scenario: JobScenario) -> None:
    scenario.apply(retry={"limit": 0})
    first, second, third = scenario.until_train()
    scenario.reason("Training")
    scenario.kubelet.preempt(second)
    scenario.kubelet.end(first, failing("peer", 0))
    scenario.kubelet.end(third, failing("peer", 2))

    def failed_ranks() -> str:
        (job,) = scenario.api.objects("Job", scenario.namespace, {"jobset.sigs.k8s.io/jobset-name": f"{NAME}-train-1"})
        return str(job["status"].get("failedIndexes"))

    wait_until(lambda: failed_ranks() == "0,2", "both failures to be seen by the Job")
    pods = scenario.api.objects("Pod", scenario.namespace, {"finetune.dev/stage": "train"})
    assert {pod["metadata"]["uid"] for pod in pods} == {pod["metadata"]["uid"] for pod in (first, second, third)}
    scenario.kubelet.finish_termination(second, failing("preempted", 1))
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.TRAIN) == ["evicted", "succeeded"]


def test_what_a_queue_takes_back_goes_on_as_the_same_attempt_and_what_a_user_suspends_as_the_next(
    scenario: JobScenario,
) -> None:
    scenario.apply(podTemplate={"queueName": "team"}, retry={"limit": 0})
    scenario.until(Stage.TRAIN)
    scenario.reason("Training")
    child = scenario.api.get("TrainJob", f"{NAME}-train-1", scenario.namespace)
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    scenario.api.patch(child, {"spec": {"suspend": True}})
    for pod in scenario.pods_terminating():
        scenario.kubelet.finish_termination(pod, failing("preempted", 0))
    scenario.reason("Queued")
    scenario.api.patch(child, {"spec": {"suspend": False}})
    for pod in scenario.pods(3, Stage.TRAIN):
        scenario.kubelet.run(pod)
    scenario.reason("Training")
    scenario.patch({"spec": {"suspend": True}})
    with scenario.kubelet.playing(scenario.namespace, lambda _: None):
        scenario.wait(is_true("Suspended"), "Suspended")
    wait_until(lambda: not scenario.api.objects("TrainJob", scenario.namespace), "the TrainJob to be gone")
    scenario.patch({"spec": {"suspend": False}})
    done = scenario.carry_on()
    assert scenario.attempts(done, Stage.TRAIN) == ["suspended", "succeeded"]
