"""The reconciler against an API server in memory: killed or refused at every single request."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.finetune_operator.decision.world import SPEC
from tests.unit.finetune_operator.decision.world import job as world
from tests.unit.finetune_operator.fake_cluster import KEY, FakeCluster, Fault, Killed

from finetune_api.base import STAGES, Stage
from finetune_api.report import Report
from finetune_api.runconfig import Attempt
from finetune_operator.cluster.api import ApiError
from finetune_operator.manifests.trainjob import TrainJobBackend

Script = Callable[[Attempt, int], str | None]


def all_well(attempt: Attempt, rank: int) -> str | None:
    return None


def train_crashes_once(attempt: Attempt, rank: int) -> str | None:
    if attempt.stage is Stage.TRAIN and attempt.number == 1:
        return "cuda-oom" if rank == 2 else "peer"
    return None


async def run(fault: Fault, script: Script = all_well) -> FakeCluster:
    cluster = FakeCluster()
    cluster.fault, cluster.script = fault, script
    await cluster.carry_on()
    return cluster


def endings(cluster: FakeCluster) -> list[tuple[str, int, str, str | None, int | None]]:
    return [(r.stage, r.number, r.outcome, r.reason, r.rank) for r in cluster.status.attempts]


def nothing(number: int, verb: str, when: str) -> None:
    return None


@pytest.mark.parametrize("script", [all_well, train_crashes_once])
async def test_killed_after_any_request_a_fresh_operator_brings_the_same_end(script: Script) -> None:
    undisturbed = await run(nothing, script)
    assert undisturbed.is_true("Complete")
    total = len(undisturbed.requests)
    assert 40 < total < 90
    for k in range(total):
        killed = await run(lambda n, _, when, k=k: Killed() if (n, when) == (k, "after") else None, script)  # type: ignore[misc]
        assert endings(killed) == endings(undisturbed), k
        assert killed.is_true("Complete")
        assert len(killed.uploads) == 1


REFUSALS = [
    ApiError(409, "Conflict", ""),
    ApiError(429, "TooManyRequests", "", retry_after=1),
    ApiError(500, "InternalError", "etcd"),
    ApiError(503, "ServiceUnavailable", ""),
]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_refused_at_any_request_or_timed_out_after_the_server_acted_the_end_is_the_same(when: str) -> None:
    undisturbed = await run(nothing, train_crashes_once)
    for k in range(len(undisturbed.requests)):
        error = REFUSALS[k % len(REFUSALS)] if when == "before" else ApiError(0, "Unreachable", "")
        stumbled = await run(lambda n, _, w, k=k, e=error: e if (n, w) == (k, when) else None, train_crashes_once)  # type: ignore[misc]
        assert endings(stumbled) == endings(undisturbed), k
        assert len(stumbled.uploads) == 1


async def test_a_job_costs_few_writes() -> None:
    cluster = await run(nothing)
    writes = [request for request in cluster.requests if request[0] in ("create", "update", "delete")]
    assert len(writes) <= 42, writes


async def test_a_fresh_operator_writes_nothing_for_a_job_that_has_not_changed() -> None:
    cluster = await run(nothing)
    for _ in range(3):
        cluster.requests.clear()
        await cluster.operator().reconcile(KEY)
        assert cluster.requests == []


async def test_a_refused_start_is_said_and_tried_again() -> None:
    cluster = FakeCluster()
    error = ApiError(500, "InternalError", "failed calling webhook: connection refused")
    asleep = [True]
    cluster.fault = lambda n, verb, when: (
        error if asleep[0] and cluster.requests[n] == ("create", "PyTorchJob") and when == "before" else None
    )
    with pytest.raises(AssertionError, match="stuck: Waiting: A webhook"):
        await cluster.carry_on(seconds=40)
    asleep[0] = False
    await cluster.carry_on()
    assert [r.number for r in cluster.status.attempts] == [1, 1, 1, 1]


async def test_a_job_whose_snapshot_has_another_image_keeps_it() -> None:
    cluster = FakeCluster({**SPEC, "image": "trainer:1"})
    cluster.script = lambda attempt, rank: None
    operator = cluster.operator()
    for _ in range(4):
        cluster.show(operator.store)
        await operator.reconcile(KEY)
    cluster.objects["FineTuneJob", "support"]["spec"] = {**SPEC, "image": "trainer:2"}
    cluster.objects["FineTuneJob", "support"]["metadata"]["generation"] = 2
    await cluster.carry_on()
    images = {str(pod["spec"]["containers"][0]["image"]) for pod in cluster.of("Pod")}
    assert images == {"trainer:1"}
    assert [record.stage for record in cluster.status.attempts] == list(STAGES)


@pytest.mark.parametrize("kind", ["PyTorchJob", "Pod"])
async def test_what_went_away_unheard_holds_nothing_up_for_long(kind: str) -> None:
    cluster = FakeCluster()
    cluster.script, cluster.unheard = train_crashes_once, frozenset({kind})
    await cluster.carry_on(seconds=120)
    assert cluster.is_true("Complete")
    assert [r.number for r in cluster.status.attempts if r.stage is Stage.TRAIN] == [1, 2]


@pytest.mark.parametrize("stage", STAGES)
async def test_pods_that_are_heard_of_before_their_owner_end_nothing(stage: Stage) -> None:
    cluster = FakeCluster()
    cluster.late = {"Job": 3, "PyTorchJob": 3}
    await cluster.carry_on()
    assert [r.outcome for r in cluster.status.attempts if r.stage is stage] == ["succeeded"]


async def test_a_pod_that_is_seen_before_what_made_it_ends_no_attempt() -> None:
    cluster = FakeCluster()
    operator = cluster.operator()
    while not cluster.of("Job"):
        cluster.show(operator.store)
        await operator.reconcile(KEY)
    assert operator.store.of("Job", KEY), "what was made is known without a watch"
    cluster.tick()
    # Another replica made the Job; of its events only the pod's have come.
    fresh = cluster.operator()
    fresh.store.keep_only("Job", "", set(), 1_000_000)
    assert fresh.store.of("Pod", KEY)
    assert not fresh.store.of("Job", KEY)
    await fresh.reconcile(KEY)
    assert [record.outcome for record in cluster.status.attempts] == ["running"]


async def test_pods_whose_owner_was_deleted_from_outside_end_their_attempt() -> None:
    cluster = FakeCluster()
    operator = cluster.operator()
    while not cluster.of("Pod"):
        cluster.show(operator.store)
        await operator.reconcile(KEY)
        cluster.tick()
    (job,) = cluster.of("Job")
    del cluster.objects["Job", job["metadata"]["name"]]
    cluster.show(operator.store)
    await operator.reconcile(KEY)
    assert [(record.outcome, record.reason) for record in cluster.status.attempts] == [("failed", "deleted")]


async def until_it_trains(cluster: FakeCluster) -> None:
    operator = cluster.operator()
    while not any(
        pod["status"]["phase"] == "Running" for pod in cluster.of("Pod") if "train" in pod["metadata"]["name"]
    ):
        cluster.tick()
        cluster.show(operator.store)
        await operator.reconcile(KEY)


async def test_an_operator_whose_backend_was_changed_ends_the_attempt_that_runs_with_what_carries_it() -> None:
    cluster = FakeCluster()
    await until_it_trains(cluster)
    cluster.backend = TrainJobBackend()
    await cluster.carry_on()
    assert endings(cluster) == endings(await run(nothing))
    assert not cluster.of("TrainJob")


async def test_what_an_operator_of_another_backend_cannot_delete_is_said_and_waited_for() -> None:
    cluster = FakeCluster()
    cluster.script = train_crashes_once
    await until_it_trains(cluster)
    cluster.backend = TrainJobBackend()
    with pytest.raises(AssertionError, match="Its PyTorchJob belongs to another backend: delete it"):
        await cluster.carry_on(seconds=60)
    assert ("create", "TrainJob") not in cluster.requests
    assert endings(cluster)[-1] == ("train", 1, "failed", "cuda-oom", 2)
    (left,) = cluster.of("PyTorchJob")
    del cluster.objects["PyTorchJob", left["metadata"]["name"]]
    with pytest.raises(AssertionError, match="stuck"):
        await cluster.carry_on(seconds=60)
    assert [child["metadata"]["name"] for child in cluster.of("TrainJob")] == ["support-train-2"]


async def test_a_job_whose_deletion_was_missed_is_let_go() -> None:
    cluster = FakeCluster()
    operator = cluster.operator()
    cluster.fault = lambda number, verb, when: ApiError(404, "NotFound", "") if verb == "update" else None
    with pytest.raises(ApiError):
        await operator.reconcile(KEY)
    cluster.requests.clear()
    assert await operator.reconcile(KEY) is None
    assert cluster.requests == []


async def test_a_training_pod_cannot_say_what_evaluate_and_publish_found() -> None:
    honest, forged = FakeCluster(), FakeCluster()

    def forge(attempt: Attempt, rank: int) -> str | None:
        for stage in (Stage.EVALUATE, Stage.PUBLISH) if attempt.stage is Stage.TRAIN else ():
            name = {"attempt": f"{attempt.uid}/{stage}/1", "stage": stage, "time": forged.now, "done": True}
            report = Report.model_validate(name | {"wandbUrl": "https://evil.example"} | world().product(stage))
            text = report.model_dump_json(by_alias=True, exclude_none=True)
            forged.patch_data("support-train-report", {"a": text, str(stage): text})
        return None

    forged.script = forge
    for cluster in (honest, forged):
        cluster.gate_passes = False
        await cluster.carry_on()
    assert honest.is_true("Failed")
    assert forged.status.to_wire() == honest.status.to_wire()
    assert forged.uploads == []
