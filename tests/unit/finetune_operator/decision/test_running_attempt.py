"""A running attempt: how its end is recognised, and what follows from it."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from tests.unit.finetune_operator.decision.world import ROWS, World, job, steps, true_conditions

from finetune_api.base import Stage
from finetune_api.status import Phase
from finetune_operator.decision.running_attempt import note_exit, result_of

GPU_STAGES = (Stage.TRAIN, Stage.EVALUATE)


# Failures


FATAL = ["bad-spec", "bad-data", "no-access", "does-not-fit", "storage-full", "diverged", "config-changed"]


@pytest.mark.parametrize("kind", FATAL)
def test_a_failure_that_trying_again_cannot_mend_ends_the_job(kind: str) -> None:
    world = job().training().failed_for_good(kind, rank=2)
    assert true_conditions(world) == ROWS["failed"]
    assert f"rank 2: {kind}" in world.message
    assert len(world.status.attempts) == 2
    assert sum(f"rank 2: {kind}" in event.message for event in world.events) == 1


UNCOUNTED = ["preempted", "hub-unavailable"]
COUNTED = ["crash", "hang", "host-oom", "cuda-oom", "fenced"]


@pytest.mark.parametrize("kind", UNCOUNTED + COUNTED)
def test_other_failures_are_followed_by_the_next_attempt_after_a_backoff(kind: str) -> None:
    world = job().training().with_pod_failed(kind, rank=3).all_ended().settled().gone().settled()
    record = world.attempt(Stage.TRAIN, 1)
    assert (record.outcome, record.reason, record.rank) == ("failed", kind, 3)
    assert record.counted is (kind in COUNTED)
    assert (world.status.phase, world.reason) == (Phase.BACKING_OFF, "BackingOff")
    wait = world.wakes()
    assert wait is not None
    assert 5 <= wait <= 16
    world.later(wait).settled()
    assert world.current == (Stage.TRAIN, 2)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_counted_failures_end_the_job_when_the_limit_is_used_up(limit: int) -> None:
    world = job(retry={"limit": limit}).training()
    for _ in range(limit):
        world.failed_for_good("crash").gone().later(500).settled().running().settled()
    assert world.current == (Stage.TRAIN, limit + 1)
    world.failed_for_good("crash")
    assert true_conditions(world) == ROWS["failed"]
    assert f"retry.limit {limit}" in world.message


def test_uncounted_failures_never_use_up_the_limit() -> None:
    world = job(retry={"limit": 0}).training()
    for _ in range(60):
        world.with_pod_silent(1, evicted=True).all_ended().settled().gone().later(500).settled().running().settled()
    assert world.current == (Stage.TRAIN, 61)
    assert len(world.status.attempts) == 50


def test_the_backoff_doubles_up_to_a_cap_for_the_same_failure_in_a_row() -> None:
    world = job(retry={"limit": 20}).training()
    waits = []
    for _ in range(8):
        world.failed_for_good("crash").gone().settled()
        waits.append(world.wakes() or 0)
        world.later(waits[-1]).settled().running().settled()
    assert all(
        low <= wait <= high + 1 for wait, low, high in zip(waits, (5, 10, 20, 40), (15, 30, 60, 120), strict=False)
    )
    assert max(waits) <= 451


def test_the_root_cause_on_another_rank_is_told_with_its_rank() -> None:
    world = job().training()
    world.with_pod_failed("peer", rank=0).with_pod_failed("cuda-oom", rank=3).all_ended().settled()
    assert (world.attempt(Stage.TRAIN, 1).reason, world.attempt(Stage.TRAIN, 1).rank) == ("cuda-oom", 3)


def test_peers_alone_are_waited_for_until_the_cause_speaks() -> None:
    world = job().training().with_pod_failed("peer", rank=0).settled()
    assert world.attempt(Stage.TRAIN, 1).outcome == "running"
    world.later(20).with_pod_failed("bad-data", rank=2).settled()
    assert world.attempt(Stage.TRAIN, 1).outcome == "running"
    world.all_ended().settled()
    assert world.attempt(Stage.TRAIN, 1).reason == "bad-data"


def test_pods_that_never_end_are_not_waited_for_longer_than_their_grace() -> None:
    world = job().training().with_pod_failed("peer", rank=0).settled()
    wait = world.wakes()
    assert wait == 120 + 30
    world.later(wait).settled()
    assert world.attempt(Stage.TRAIN, 1).reason == "peer"


def test_a_named_cause_is_concluded_soon_although_others_still_run() -> None:
    world = job().training().with_pod_failed("crash", rank=1).settled()
    assert world.wakes() == 10
    assert world.later(10).settled().attempt(Stage.TRAIN, 1).reason == "crash"


def test_asking_for_the_result_changes_nothing_and_noting_the_exit_says_when() -> None:
    world = job().training().with_pod_failed("crash", rank=1)
    observation = world.observe()
    running = observation.running(observation.status.attempts[-1])
    assert result_of(running, observation) is None
    assert running.record.exited is None
    note_exit(running, observation.now)
    assert running.record.exited == observation.now
    assert result_of(running, replace(observation, now=observation.now + timedelta(minutes=1))) is not None


# Hang


def silence(world: World) -> float:
    wait = world.wakes()
    assert wait is not None
    return wait


@pytest.mark.parametrize("stage", [Stage.PREPARE, *GPU_STAGES])
def test_reports_that_stop_are_a_hang_well_after_the_ranks_own_watchdogs(stage: Stage) -> None:
    world = job().until(stage).says(progress=steps(5)).settled()
    assert silence(world) == 2 * 1200 + 900
    record = world.later(silence(world)).settled().attempt(stage, 1)
    assert (record.reason, record.counted) == ("hang", True)


def test_no_report_at_all_means_that_the_channel_is_broken_and_kills_nothing() -> None:
    world = job().training()
    world.later(silence(world)).settled().later(90_000).settled()
    assert world.reason == "ReportChannelBroken"
    assert world.current == (Stage.TRAIN, 1)
    assert world.deleted == []
    assert [e.reason for e in world.events].count("ReportChannelBroken") == 1


def test_a_report_that_cannot_be_used_is_named_and_takes_nothing_from_the_operator() -> None:
    world = job().training()
    world.unusable_reports = {Stage.TRAIN: "report.time: the time has no zone."}
    world.settled()
    assert world.reason == "ReportUnusable"
    assert "report.time: the time has no zone." in world.message
    world.with_spec(lambda wire: wire.update(suspend=True)).settled()
    assert [action.stage for action in world.deleted] == [Stage.TRAIN]


def test_choices_that_pile_up_leave_the_status_storable() -> None:
    world = job().training()
    for part in range(20):
        pile = {f"{part}/{n}/{'x' * 300}": {"value": "v" * 2000, "why": "w" * 2000} for n in range(20)}
        world.says(choices=pile).settled()
    assert len(world.status.choices) <= 100
    assert len(json.dumps(world.status.to_wire())) < 200_000


# Clocks


def test_running_time_counts_only_while_all_pods_run() -> None:
    world = job().preparing().finishes().settled()
    before = world.status.active_seconds
    world.later(500).running(0, 1, 2).settled().later(100).settled()
    assert world.status.active_seconds == before
    world.running().settled().later(30).settled().later(30).settled()
    assert world.status.active_seconds == before + 60
    assert world.status.gpu_hours == pytest.approx(60 * 8 / 3600)
    assert world.status.price == pytest.approx(60 * 8 / 3600 * 2, abs=0.01)


def test_running_time_ends_with_the_pods_even_if_nobody_looked() -> None:
    world = job().training().later(100).finishes().later(5000).settled()
    assert world.status.active_seconds == 100


def test_running_time_adds_up_over_attempts() -> None:
    world = job().training().later(100).failed_for_good("crash").gone().later(500).settled().running().settled()
    assert world.later(50).settled().status.active_seconds == 150


def test_the_deadline_ends_the_job_and_frees_its_gpus() -> None:
    world = job(timeouts={"activeDeadlineSeconds": 600}).training()
    wait = world.wakes()
    assert wait == 600
    world.later(wait).settled()
    assert (true_conditions(world), world.reason) == (ROWS["failed"], "DeadlineExceeded")
    assert [(d.stage, d.number) for d in world.deleted] == [(Stage.TRAIN, 1)]


def test_a_longer_deadline_and_a_retry_go_on() -> None:
    world = job(timeouts={"activeDeadlineSeconds": 600}).training().later(600).settled().gone()
    world.with_spec(lambda wire: wire.update(timeouts={"activeDeadlineSeconds": 6000})).retried("a").settled()
    assert world.current == (Stage.TRAIN, 2)


def test_children_of_a_finished_job_are_removed_after_its_ttl() -> None:
    world = job(cleanup={"ttlSecondsAfterFinished": 3600}).complete()
    assert world.wakes() == 3600
    world.later(3599).settled()
    assert world.cleaned == 0
    world.later(1).settled().later(100).settled()
    assert world.cleaned == 1
    assert true_conditions(world) == ROWS["complete"]


def test_a_finished_job_without_a_ttl_keeps_its_children() -> None:
    world = job().complete()
    assert world.wakes() is None
    assert len(world.children) == 4
