import json
import sys
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.unit.finetune_operator.decision.world import SPEC

from finetune_api.base import Stage
from finetune_api.report import Report
from finetune_operator.cluster.observe import JobObjects, children, observe, read_pod, read_spec, reports
from finetune_operator.decision.model import Pod, PodPhase
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend

BACKEND = PyTorchJobBackend()
Body = dict[str, Any]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
NOTHING: frozenset[str] = frozenset()


def labels(stage: str = "train", attempt: str = "1", uid: str = "u1") -> dict[str, str]:
    return {"finetune.dev/uid": uid, "finetune.dev/stage": stage, "finetune.dev/attempt": attempt}


def pod(status: Body | None = None, index: int = 0, **meta: Any) -> Body:
    own = labels() | {"training.kubeflow.org/replica-index": str(index)}
    spec = {"nodeName": "node-a", "containers": [{"name": "pytorch", "resources": {"limits": {"memory": "64Gi"}}}]}
    return {"metadata": {"name": f"p{index}", "labels": own, **meta}, "spec": spec, "status": status or {}}


def ended(code: int, message: str = "", reason: str = "Error") -> Body:
    terminated = {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-01-01T00:00:09Z"}
    return {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": [{"name": "pytorch", "state": {"terminated": terminated}}],
    }


def waiting(reason: str, message: str = "") -> Body:
    return {
        "phase": "Pending",
        "containerStatuses": [
            {"name": "pytorch", "image": "i:1", "state": {"waiting": {"reason": reason, "message": message}}}
        ],
    }


def disrupted(reason: str) -> Body:
    return {"phase": "Running", "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason}]}


def read(body: Body, out_of_service: frozenset[str] = NOTHING) -> Pod:
    return read_pod(body, out_of_service)


def test_a_termination_message_is_the_failure() -> None:
    message = '{"class": "cuda-oom", "sentence": "No memory.", "rank": 5, "time": "2026-01-01T00:00:00Z"}'
    seen = read(pod(ended(68, message), index=1))
    assert (seen.node_rank, seen.phase, seen.exit_code) == (1, PodPhase.FAILED, 68)
    assert seen.failure is not None
    assert (seen.failure.failure_class, seen.failure.rank) == ("cuda-oom", 5)
    assert seen.finished == datetime(2026, 1, 1, 0, 0, 9, tzinfo=UTC)


@pytest.mark.parametrize("message", ["", "Segmentation fault", '{"class": "unheard-of"}', "[1]"])
def test_any_other_message_is_none(message: str) -> None:
    seen = read(pod(ended(139, message)))
    assert (seen.failure, seen.exit_code) == (None, 139)


def test_the_message_of_an_init_container_counts() -> None:
    message = '{"class": "no-access", "sentence": "No write access.", "time": "2026-01-01T00:00:00Z"}'
    status = {
        "phase": "Failed",
        "initContainerStatuses": ended(66, message)["containerStatuses"],
        "containerStatuses": [],
    }
    seen = read(pod(status))
    assert seen.failure is not None
    assert (seen.failure.failure_class, seen.exit_code) == ("no-access", 66)


def test_a_host_out_of_memory_comes_with_its_limit() -> None:
    seen = read(pod(ended(137, reason="OOMKilled")))
    assert (seen.oom_killed, seen.memory_limit) == (True, "64Gi")


def preparing(status: Body, *initial: Body) -> Body:
    """A pod of Prepare, with the states of its init containers by name."""
    body = pod({"phase": "Pending", "initContainerStatuses": list(initial)} | status)
    body["metadata"]["labels"] |= labels("prepare")
    limits = {"resources": {"limits": {"memory": "2Gi"}}}
    body["spec"]["initContainers"] = [{"name": each["name"], **limits} for each in initial]
    return body


def test_a_pod_runs_as_soon_as_a_program_before_its_stage_does() -> None:
    began = "2026-01-01T00:00:01Z"
    runs = {"name": "check-publish", "state": {"running": {"startedAt": began}}}
    over = {"name": "check-publish", "state": {"terminated": {"exitCode": 0, "startedAt": began}}}
    waits = {"containerStatuses": [{"name": "prepare", "state": {"waiting": {"reason": "PodInitializing"}}}]}
    for seen in (read(preparing(waits, runs)), read(preparing(waits, over))):
        assert (seen.phase, seen.started) == (PodPhase.RUNNING, datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC))
    waits_for_image = read(preparing(waiting("ImagePullBackOff"), over))
    assert waits_for_image.phase is PodPhase.PENDING
    assert "ImagePullBackOff" in waits_for_image.waiting


def test_init_containers_of_others_are_no_part_of_the_attempt() -> None:
    mesh = {"name": "mesh-init", "state": {"running": {"startedAt": "2026-01-01T00:00:01Z"}}}
    seen = read(preparing({}, mesh))
    assert (seen.phase, seen.started) == (PodPhase.PENDING, None)


def test_an_init_container_out_of_memory_comes_with_its_own_limit() -> None:
    killed = {"name": "check-publish", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    seen = read(preparing({"phase": "Failed"}, killed))
    assert (seen.phase, seen.oom_killed, seen.memory_limit) == (PodPhase.FAILED, True, "2Gi")


@pytest.mark.parametrize(
    ("status", "evicted", "lost"),
    [
        (disrupted("PreemptionByScheduler"), True, False),
        (disrupted("EvictionByEvictionAPI"), True, False),
        (disrupted("TerminationByKubelet"), True, False),
        (disrupted("DeletionByTaintManager"), False, True),
        ({"phase": "Failed", "reason": "Evicted"}, True, False),
        ({"phase": "Unknown", "reason": "NodeLost"}, False, True),
        ({"phase": "Running"}, False, False),
    ],
)
def test_what_the_cluster_took_away(status: Body, evicted: bool, lost: bool) -> None:
    seen = read(pod(status))
    assert (seen.evicted, seen.node_lost) == (evicted, lost)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (waiting("ImagePullBackOff", "not found"), "ImagePullBackOff): not found"),
        (waiting("ErrImagePull"), "i:1"),
        (waiting("CreateContainerConfigError", 'secret "x" not found'), 'secret "x"'),
        (waiting("ContainerCreating"), ""),
        (
            {"phase": "Pending", "conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": "0/3"}]},
            "0/3",
        ),
        ({"phase": "Running", "containerStatuses": waiting("CrashLoopBackOff")["containerStatuses"]}, ""),
    ],
)
def test_why_a_pod_does_not_start(status: Body, words: str) -> None:
    seen = read(pod(status))
    assert words in seen.waiting
    assert bool(seen.waiting) is bool(words)


def test_a_pod_on_a_dead_node_cannot_write_any_more() -> None:
    body = pod({"phase": "Running"}, deletionTimestamp="2026-01-01T00:00:00Z")
    assert read(body, frozenset({"node-a"})).out_of_service
    assert read(body).terminating


def carrier(uid: str = "u1", owner: str | None = None, **meta: Any) -> Body:
    owners = [{"uid": owner or uid, "controller": True}]
    made = {"name": "support-train-1", "labels": labels(uid=uid), "ownerReferences": owners, **meta}
    return {"metadata": made, "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 3}}}}


def test_a_child_is_its_object_and_its_pods_by_rank() -> None:
    (seen,) = children("u1", [carrier()], [pod(index=2), pod(index=0)], NOTHING, BACKEND)
    assert (seen.stage, seen.number, seen.ours, seen.exists, seen.pods_expected) == (Stage.TRAIN, 1, True, True, 3)
    assert [p.node_rank for p in seen.pods] == [0, 2]


def test_pods_without_their_object_are_still_a_child() -> None:
    (seen,) = children("u1", [], [pod()], NOTHING, BACKEND)
    assert (seen.exists, seen.ours, len(seen.pods)) == (False, True, 1)


def test_children_of_an_older_job_of_the_name_are_not_ours() -> None:
    found = children("u2", [carrier("u1"), carrier("u2")], [pod()], NOTHING, BACKEND)
    assert [(child.ours, len(child.pods)) for child in found] == [(False, 1), (True, 0)]


def test_objects_that_carry_no_attempt_are_no_children() -> None:
    stray = deepcopy(carrier())
    stray["metadata"]["labels"] = {
        "finetune.dev/uid": "u1",
        "finetune.dev/stage": "dancing",
        "finetune.dev/attempt": "1",
    }
    assert children("u1", [stray, {"metadata": {"name": "x"}}], [], NOTHING, BACKEND) == ()


def report_map(uid: str = "u1") -> Body:
    report = Report(attempt="u1/train/1", stage=Stage.TRAIN, time=datetime(2026, 1, 1, tzinfo=UTC))
    data = {"train": report.model_dump_json(by_alias=True, exclude_none=True)}
    return {"metadata": {"name": "r", "ownerReferences": [{"uid": uid, "controller": True}]}, "data": data}


def test_reports_that_can_be_read_are_read() -> None:
    cut_off = report_map() | {"data": {"prepare": "{cut off"}}
    found = reports({Stage.PREPARE: cut_off, Stage.TRAIN: report_map(), Stage.EVALUATE: None}, "u1", NOW)[0]
    assert [report.attempt for report in found] == ["u1/train/1"]


@pytest.mark.parametrize("attempt", ["u1/evaluate/1", "u0/train/1", "train", "u1/train", "u1/train/1/evaluate/1"])
def test_a_report_of_another_stage_or_job_is_not_listened_to(attempt: str) -> None:
    for stage in (Stage.TRAIN, Stage.EVALUATE):
        report = Report(attempt=attempt, stage=stage, time=datetime(2026, 1, 1, tzinfo=UTC))
        data = {"train": report.model_dump_json(by_alias=True, exclude_none=True)}
        assert reports({Stage.TRAIN: report_map() | {"data": data}}, "u1", NOW)[0] == ()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"time": "2026-01-01T00:00:00"}, "report.time: the time has no zone"),
        ({"time": "9999-12-31T23:59:59Z"}, "report.time: the year is not between"),
        ({"time": "2026-01-03T00:00:00Z"}, "report.time: 2026-01-03T00:00:00Z is more than a day ahead."),
        ({"progress": {"step": 10**4299}}, "report.progress.step: "),
        ({"progress": {"step": -1}}, "report.progress.step: Input should be greater than or equal to 0."),
        ({"model": {"numHiddenLayers": 10**6}}, "report.model."),
        ({"warnings": ["x" * 200_000]}, "longer than 131,072 characters."),
    ],
)
def test_a_report_that_no_trainer_writes_is_set_aside_with_the_reason(fields: Body, problem: str) -> None:
    sys.set_int_max_str_digits(0)
    honest = {"attempt": "u1/train/1", "stage": "train", "time": "2026-01-01T00:00:00Z"}
    text = json.dumps(honest | fields)
    sys.set_int_max_str_digits(4300)
    usable, unusable = reports({Stage.TRAIN: report_map() | {"data": {"train": text}}}, "u1", NOW)
    assert usable == ()
    assert problem in unusable[Stage.TRAIN]


def test_reports_of_an_older_job_of_the_name_are_not_listened_to() -> None:
    assert reports({Stage.TRAIN: report_map(uid="u0")}, "u1", NOW) == ((), {})


def test_a_spec_that_cannot_be_read_says_where() -> None:
    _, why = read_spec({"spec": SPEC | {"topology": {"nodes": "many"}}})
    assert why.startswith("spec.topology.nodes: ")


def test_a_job_is_observed_as_it_is_persisted() -> None:
    meta = {
        "namespace": "ml",
        "name": "support",
        "uid": "u1",
        "generation": 4,
        "annotations": {"finetune.dev/retry": "2"},
    }
    job = {"metadata": meta, "spec": SPEC, "status": {"phase": "Training", "fieldOfANewerVersion": 1}}
    seen = observe(
        JobObjects(job=job, spec=read_spec(job)[0], channels={Stage.TRAIN: report_map()}),
        BACKEND,
        datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert (seen.uid, seen.generation, seen.status.phase, seen.deleting) == ("u1", 4, "Training", False)
    assert seen.annotations == {"finetune.dev/retry": "2"}
    assert len(seen.reports) == 1


# --- containers of others, and what the kubelet says -----------------------------------------------------------------


def state(name: str, code: int | None, reason: str = "Error", message: str = "") -> Body:
    """A container that runs (code None) or has ended."""
    ended = {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-01-01T00:00:09Z"}
    return {"name": name, "state": {"running": {}} if code is None else {"terminated": ended}}


@pytest.mark.parametrize(
    ("where", "sidecar"),
    [
        ("initContainerStatuses", state("istio-proxy", 143)),
        ("initContainerStatuses", state("istio-proxy", 65)),
        ("containerStatuses", state("a-proxy", 137, "OOMKilled")),
    ],
)
def test_containers_of_others_do_not_say_how_an_attempt_ended(where: str, sidecar: Body) -> None:
    own = state("pytorch", 139)
    status: Body = {"phase": "Failed", "containerStatuses": [own]}
    status[where] = [sidecar, *status.get(where, [])]
    body = pod(status)
    body["spec"]["containers"].insert(0, {"name": "a-proxy", "resources": {"limits": {"memory": "1Gi"}}})
    seen = read(body)
    assert (seen.exit_code, seen.oom_killed, seen.memory_limit) == (139, False, "64Gi")


@pytest.mark.parametrize(("code", "phase"), [(0, PodPhase.SUCCEEDED), (1, PodPhase.FAILED)])
def test_an_attempt_ends_with_its_own_containers_although_a_sidecar_runs_on(code: int, phase: PodPhase) -> None:
    body = pod({"phase": "Running", "containerStatuses": [state("istio-proxy", None), state("pytorch", code)]})
    seen = read(body)
    assert (seen.phase, seen.lingering) == (phase, "istio-proxy")
    gang = carrier()
    gang["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = 1
    (child,) = children("u1", [gang], [body], NOTHING, BACKEND)
    assert child.succeeded == (code == 0)


OVER_LIMIT = "Pod ephemeral local storage usage exceeds the total limit of containers 2Gi. "
LOW_NODE = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 90Mi."
UNHEALTHY = "Allocate failed due to no healthy devices present; cannot allocate unhealthy devices nvidia.com/gpu"


@pytest.mark.parametrize(
    ("reason", "message", "evicted", "over_own_limit", "refused"),
    [
        ("Evicted", OVER_LIMIT, True, True, False),
        ("Evicted", 'Usage of EmptyDir volume "tmp" exceeds the limit "2Gi". ', True, True, False),
        ("Evicted", "Container pytorch exceeded its local ephemeral storage limit", True, True, False),
        ("Evicted", LOW_NODE, True, False, False),
        ("UnexpectedAdmissionError", UNHEALTHY, False, False, True),
        ("OutOfcpu", "Node didn't have enough resource: cpu", False, False, True),
        ("NodeAffinity", "Pod was rejected: Predicate NodeAffinity failed", False, False, True),
    ],
)
def test_why_a_kubelet_ended_a_pod_is_kept(
    reason: str, message: str, evicted: bool, over_own_limit: bool, refused: bool
) -> None:
    seen = read(pod({"phase": "Failed", "reason": reason, "message": message}))
    assert (seen.evicted, seen.over_own_limit, seen.refused) == (evicted, over_own_limit, refused)
    assert seen.message == message


def test_what_the_runtime_says_of_a_container_that_never_started_is_kept() -> None:
    seen = read(pod({"phase": "Failed", "containerStatuses": [state("pytorch", 128, "StartError", "no python")]}))
    assert (seen.exit_code, seen.message, seen.refused) == (128, "no python", False)


@pytest.mark.parametrize("reason", ["SchedulingGated", "Unschedulable"])
def test_a_pod_that_is_not_scheduled_says_why(reason: str) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": "Scheduling is blocked."}
    assert "Scheduling is blocked." in read(pod({"phase": "Pending", "conditions": [condition]})).waiting
