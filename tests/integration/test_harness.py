"""The harness keeps its word: the controllers are the real ones, and the kubelet is the test."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from .harness.api import Api, ApiError, Resource
from .harness.control_plane import ControlPlane
from .harness.fake_kubelet import Exit, FakeKubelet, run_forever, succeed
from .harness.manifests import batch_job, claim, config_map, worker_only_pytorchjob
from .harness.processes import wait_until


def create_pytorchjob(control_plane: ControlPlane, namespace: str, workers: int = 3) -> Resource:
    return control_plane.api.create(worker_only_pytorchjob("gang", workers), namespace)


def wait_for_condition(api: Api, target: Resource, kind: str, timeout_seconds: float = 30) -> Resource:
    def with_condition() -> Resource | None:
        present = api.refresh(target)
        conditions = (present or {}).get("status", {}).get("conditions") or []
        return present if any(c["type"] == kind and c["status"] == "True" for c in conditions) else None

    return wait_until(with_condition, f"{target['kind']} {target['metadata']['name']} to be {kind}", timeout_seconds)


def wait_until_gone(api: Api, target: Resource) -> None:
    wait_until(lambda: api.refresh(target) is None, f"{target['kind']} {target['metadata']['name']} to be gone")


def test_a_worker_only_pytorchjob_becomes_pods_and_services_that_carry_their_rank(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    create_pytorchjob(control_plane, namespace)
    pods = kubelet.wait_for_pods(namespace, 3, {"training.kubeflow.org/job-name": "gang"})
    names = ["gang-worker-0", "gang-worker-1", "gang-worker-2"]
    assert [pod["metadata"]["name"] for pod in pods] == names
    for index, pod in enumerate(pods):
        labels = pod["metadata"]["labels"]
        assert labels["training.kubeflow.org/operator-name"] == "pytorchjob-controller"
        assert labels["training.kubeflow.org/replica-type"] == "worker"
        assert labels["training.kubeflow.org/replica-index"] == str(index)
        # Without a Master replica the training-operator calls worker 0 the master.
        assert labels.get("training.kubeflow.org/job-role") == ("master" if index == 0 else None)
    services = wait_until(
        lambda: found if len(found := control_plane.api.objects("Service", namespace)) == 3 else None, "3 Services"
    )
    assert [service["metadata"]["name"] for service in services] == names
    assert all(service["spec"]["clusterIP"] == "None" for service in services)


def test_a_worker_only_pytorchjob_gets_no_init_container_and_only_the_size_of_the_gang(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    create_pytorchjob(control_plane, namespace)
    for pod in kubelet.wait_for_pods(namespace, 3):
        assert "initContainers" not in pod["spec"]
        (container,) = pod["spec"]["containers"]
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert environment["PET_NNODES"] == "3"
        assert environment["PET_NPROC_PER_NODE"] == "4"
        assert environment["PET_MASTER_ADDR"] == "gang-worker-0"
        assert "WORLD_SIZE" not in environment


def test_a_pytorchjob_succeeds_only_when_all_its_workers_have(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    job = create_pytorchjob(control_plane, namespace)
    pods = [kubelet.run(pod) for pod in kubelet.wait_for_pods(namespace, 3)]
    wait_for_condition(control_plane.api, job, "Running")
    for pod in pods[:2]:
        kubelet.end(pod)
    wait_until(lambda: worker_counts(control_plane.api, job).get("succeeded") == 2, "two workers to be counted")
    assert "Succeeded" not in true_conditions(control_plane.api, job)
    kubelet.end(pods[2])
    wait_for_condition(control_plane.api, job, "Succeeded")


def test_a_failed_worker_fails_the_pytorchjob_and_its_last_words_stay_readable(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    job = create_pytorchjob(control_plane, namespace)
    pods = [kubelet.run(pod) for pod in kubelet.wait_for_pods(namespace, 3)]
    kubelet.end(pods[1], Exit(code=3, message='{"class": "hang", "rank": 5}'))
    wait_for_condition(control_plane.api, job, "Failed")
    left = kubelet.wait_for_pods(namespace, 3)
    assert [pod["status"]["phase"] for pod in left] == ["Running", "Failed", "Running"]
    (container,) = left[1]["status"]["containerStatuses"]
    assert container["state"]["terminated"]["message"] == '{"class": "hang", "rank": 5}'


def test_a_batch_job_completes_when_its_pod_succeeds(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    job = control_plane.api.create(batch_job("prepare"), namespace)
    with kubelet.playing(namespace, succeed):
        wait_for_condition(control_plane.api, job, "Complete")


def test_a_batch_job_fails_when_its_pod_fails(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    job = control_plane.api.create(batch_job("prepare"), namespace)
    with kubelet.playing(namespace, lambda _: Exit(code=1)):
        wait_for_condition(control_plane.api, job, "Failed")


def test_an_error_in_the_script_of_the_kubelet_reaches_the_test(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    def script(_: Resource) -> Exit:
        raise ValueError("a mistake in the test")

    job = control_plane.api.create(batch_job("prepare"), namespace)
    with pytest.raises(ValueError, match="a mistake in the test"), kubelet.playing(namespace, script):
        wait_for_condition(control_plane.api, job, "Complete", timeout_seconds=2)


def test_deleting_an_owner_takes_its_children_along(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    api = control_plane.api
    job = create_pytorchjob(control_plane, namespace)
    child = api.create(config_map("report", owner=job), namespace)
    kubelet.wait_for_pods(namespace, 3)
    api.delete(job)
    wait_until_gone(api, child)
    wait_until(lambda: not api.objects("Pod", namespace), "the pods to be gone")
    wait_until(lambda: not api.objects("Service", namespace), "the Services to be gone")


def test_owners_of_a_kind_installed_later_are_collected_too(own_control_plane: ControlPlane, namespace: str) -> None:
    api = own_control_plane.api
    definition = custom_resource_definition("gadgets", "Gadget")
    own_control_plane.install_crds(definition)
    owner = api.create({"apiVersion": "test.dev/v1", "kind": "Gadget", "metadata": {"name": "owner"}}, namespace)
    child = api.create(config_map("child", owner=owner), namespace)
    api.delete(owner)
    wait_until_gone(api, child)
    api.delete(definition)


def test_a_deleted_pod_that_ran_stays_until_its_kubelet_has_ended_it(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    job = create_pytorchjob(control_plane, namespace)
    first, *_ = [kubelet.run(pod) for pod in kubelet.wait_for_pods(namespace, 3)]
    control_plane.api.delete(first)
    wait_for_condition(control_plane.api, job, "Failed")
    terminating = control_plane.api.refresh(first)
    assert terminating is not None
    assert terminating["status"]["phase"] == "Running"
    kubelet.finish_termination(first)
    wait_until_gone(control_plane.api, first)


def test_a_pod_deleted_before_it_was_placed_is_made_again(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    create_pytorchjob(control_plane, namespace)
    first, *_ = kubelet.wait_for_pods(namespace, 3)
    control_plane.api.delete(first)
    wait_until_gone(control_plane.api, first)
    again, *_ = kubelet.wait_for_pods(namespace, 3)
    assert again["metadata"]["name"] == first["metadata"]["name"]
    assert again["metadata"]["uid"] != first["metadata"]["uid"]


def test_pods_of_a_lost_node_terminate_until_the_node_is_out_of_service(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    node = f"node-{namespace}"
    kubelet.add_node(node)
    create_pytorchjob(control_plane, namespace, workers=1)
    (pod,) = kubelet.wait_for_pods(namespace, 1)
    pod = kubelet.run(pod, node)
    kubelet.lose_node(node)
    lost = control_plane.api.refresh(pod)
    assert lost is not None
    assert "deletionTimestamp" in lost["metadata"]
    reasons = {condition["type"]: condition.get("reason") for condition in lost["status"]["conditions"]}
    assert reasons["DisruptionTarget"] == "DeletionByTaintManager"
    kubelet.out_of_service(node)
    wait_until_gone(control_plane.api, pod)


def test_a_lost_node_that_comes_back_is_ready_and_without_taints(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    node = f"node-{namespace}"
    kubelet.add_node(node)
    kubelet.lose_node(node)
    lost = control_plane.api.get("Node", node)
    assert {taint["key"] for taint in lost["spec"]["taints"]} >= {"node.kubernetes.io/unreachable"}
    back = kubelet.add_node(node)
    assert "taints" not in back["spec"]
    assert condition_of(back, "Ready")["status"] == "True"


def test_preemption_eviction_and_waiting_look_as_a_cluster_writes_them(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    create_pytorchjob(control_plane, namespace)
    evicted, preempted, waiting = kubelet.wait_for_pods(namespace, 3)
    unplaced = kubelet.unschedulable(waiting)
    assert condition_of(unplaced, "PodScheduled")["reason"] == "Unschedulable"
    stuck = kubelet.waiting(kubelet.bind(waiting), "ImagePullBackOff", "not found")
    assert stuck["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ImagePullBackOff"
    evicted = kubelet.evict(kubelet.run(evicted))
    assert (evicted["status"]["phase"], evicted["status"]["reason"]) == ("Failed", "Evicted")
    kubelet.preempt(kubelet.run(preempted))
    running_on = control_plane.api.refresh(preempted)
    assert running_on is not None
    assert condition_of(running_on, "DisruptionTarget")["reason"] == "PreemptionByScheduler"
    assert running_on["status"]["phase"] == "Running"


def test_a_claim_waits_until_a_volume_is_made_for_it(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    pending = control_plane.api.create(claim("run"), namespace)
    assert pending["status"]["phase"] == "Pending"
    bound = kubelet.bind_claim(pending)
    assert bound["status"]["phase"] == "Bound"


def test_a_quota_refuses_what_exceeds_it(control_plane: ControlPlane, namespace: str) -> None:
    quota: Resource = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
    created = control_plane.api.create({**quota, "spec": {"hard": {"count/jobs.batch": "0"}}}, namespace)
    wait_until(lambda: (control_plane.api.refresh(created) or {}).get("status", {}).get("hard"), "the quota to hold")
    with pytest.raises(ApiError, match="exceeded quota"):
        control_plane.api.create(batch_job("prepare"), namespace)


def test_pods_that_are_not_restricted_are_refused(control_plane: ControlPlane, namespace: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}
    with pytest.raises(ApiError, match="violates PodSecurity"):
        control_plane.api.create({**pod, "spec": {"containers": [{"name": "c", "image": "i"}]}}, namespace)


def test_a_service_account_may_do_what_its_role_says_and_the_audit_log_tells_what_it_did(
    own_control_plane: ControlPlane, namespace: str
) -> None:
    own_control_plane.apply(READER, namespace)
    api = Api(own_control_plane.kubeconfig_for("reader", namespace))
    assert api.objects("ConfigMap", namespace)
    with pytest.raises(ApiError, match="forbidden"):
        api.objects("Secret", namespace)
    user = f"system:serviceaccount:{namespace}:reader"
    events = own_control_plane.audit_events(user)
    asked = [
        (event["verb"], event["objectRef"]["resource"], event["responseStatus"]["code"])
        for event in events
        if "objectRef" in event
    ]
    assert asked == [("list", "configmaps", 200), ("list", "secrets", 403)]
    assert own_control_plane.permissions_used(user) == {("", "configmaps", "list")}


def test_a_proxy_can_stand_between_a_service_account_and_the_api_server(
    control_plane: ControlPlane, namespace: str
) -> None:
    path = control_plane.kubeconfig_for("default", namespace, server="http://127.0.0.1:1")
    (cluster,) = yaml.safe_load(path.read_text())["clusters"]
    assert cluster["cluster"] == {"server": "http://127.0.0.1:1"}


def test_the_training_operator_refuses_what_its_webhook_forbids(
    own_control_plane: ControlPlane, namespace: str
) -> None:
    job = worker_only_pytorchjob("gang", 1)
    template: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    template["spec"]["containers"][0]["name"] = "not-pytorch"
    with pytest.raises(ApiError, match=r"admission webhook .* denied the request"):
        own_control_plane.api.create(job, namespace)


def test_a_webhook_that_is_not_up_yet_refuses_pytorchjobs_of_one_namespace_only(
    own_control_plane: ControlPlane, namespace: str
) -> None:
    other = own_control_plane.create_namespace()
    with own_control_plane.webhook_down(namespace):
        with pytest.raises(ApiError, match=r"failed calling webhook.*connection refused") as refusal:
            create_pytorchjob(own_control_plane, namespace)
        assert (refusal.value.code, refusal.value.reason) == (500, "InternalError")
        create_pytorchjob(own_control_plane, other)
    create_pytorchjob(own_control_plane, namespace)
    own_control_plane.delete_namespace(other)


def test_a_stopped_training_operator_comes_back_and_catches_up(
    own_control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    own_control_plane.set_webhook_enabled(False)
    own_control_plane.stop_training_operator()
    try:
        create_pytorchjob(own_control_plane, namespace, workers=1)
        assert own_control_plane.api.objects("Pod", namespace) == []
    finally:
        own_control_plane.start_training_operator()
        own_control_plane.set_webhook_enabled(True)
    kubelet.wait_for_pods(namespace, 1)


def test_a_running_gang_ends_when_its_job_is_deleted(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet
) -> None:
    api = control_plane.api
    job = create_pytorchjob(control_plane, namespace)
    with kubelet.playing(namespace, run_forever):
        wait_until(
            lambda: [p["status"]["phase"] for p in api.objects("Pod", namespace)] == ["Running"] * 3, "a running gang"
        )
        api.delete(job)
        wait_until(lambda: not api.objects("Pod", namespace), "the pods to be gone")


def test_no_program_outlives_a_test_run_that_is_killed(request: pytest.FixtureRequest) -> None:
    script = (
        "import time\n"
        "from pathlib import Path\n"
        "from tests.integration.harness.processes import Process\n"
        "process = Process('sleep', ['sleep', '600'], Path('/dev/null'))\n"
        "process.start()\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    root = request.config.rootpath
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        run.kill()
    wait_until(lambda: not is_alive(child), f"process {child} to be gone", timeout_seconds=5)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def true_conditions(api: Api, target: Resource) -> set[str]:
    present = api.refresh(target) or {}
    conditions = present.get("status", {}).get("conditions") or []
    return {condition["type"] for condition in conditions if condition["status"] == "True"}


def worker_counts(api: Api, job: Resource) -> Resource:
    present = api.refresh(job) or {}
    counts: Resource = present.get("status", {}).get("replicaStatuses", {}).get("Worker", {})
    return counts


def condition_of(pod: Resource, kind: str) -> Resource:
    (condition,) = [condition for condition in pod["status"]["conditions"] if condition["type"] == kind]
    found: Resource = condition
    return found


def custom_resource_definition(plural: str, kind: str) -> Resource:
    schema = {"openAPIV3Schema": {"type": "object"}}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.test.dev"},
        "spec": {
            "group": "test.dev",
            "scope": "Namespaced",
            "names": {"plural": plural, "singular": kind.lower(), "kind": kind},
            "versions": [version],
        },
    }


READER = """
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [configmaps], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: reader}]
"""
