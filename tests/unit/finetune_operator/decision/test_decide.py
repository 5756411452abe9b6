"""A table of decisions: what the world looks like, and what is said and done about it."""

from dataclasses import replace

import pytest
from tests.unit.finetune_operator.decision.world import UID, World, checkpoint, job, plan, steps

from finetune_api.base import STAGES, Stage
from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import STAGE_CONDITION, ConditionType, Phase
from finetune_operator.decision import deadlines
from finetune_operator.decision.model import Child, Environment, Missing, Pod, PodPhase, StartAttempt

ROWS: dict[str, set[ConditionType]] = {
    "progressing": {ConditionType.RECONCILING},
    "suspended": {ConditionType.SUSPENDED},
    "complete": {ConditionType.READY, ConditionType.COMPLETE},
    "failed": {ConditionType.STALLED, ConditionType.FAILED},
}
STAGE_KINDS = set(STAGE_CONDITION.values())
GPU_STAGES = (Stage.TRAIN, Stage.EVALUATE)


def true_conditions(world: World) -> set[ConditionType]:
    return {c.type for c in world.status.conditions if c.status == "True"} - STAGE_KINDS


# The way to the end


def test_a_job_goes_through_four_stages_to_complete() -> None:
    world = job().complete()
    assert [(r.stage, r.number, r.outcome) for r in world.status.attempts] == [(s, 1, "succeeded") for s in STAGES]
    assert true_conditions(world) == ROWS["complete"]
    assert all(world.is_true(kind) for kind in STAGE_KINDS)
    assert world.status.phase is Phase.COMPLETE
    assert world.status.stage is None
    assert world.status.metric_text == "0.415 → 0.623"


def test_without_a_target_nothing_is_published_and_the_job_is_complete() -> None:
    world = job(publish=None).complete()
    assert [r.stage for r in world.status.attempts] == [Stage.PREPARE, Stage.TRAIN, Stage.EVALUATE]
    assert true_conditions(world) == ROWS["complete"]
    published = world.condition(ConditionType.PUBLISHED)
    assert (published.status, published.reason) == ("False", "NotRequested")


def test_from_creation_to_complete_it_writes_and_tells_little() -> None:
    world = job().complete()
    assert world.writes <= 10
    assert len(world.events) <= 8
    assert len({(e.reason, e.message) for e in world.events}) == len(world.events)


def test_all_conditions_are_written_on_first_touch() -> None:
    world = job()
    world.step()
    assert {c.type for c in world.status.conditions} == set(ConditionType)
    assert {c.observed_generation for c in world.status.conditions} == {1}
    assert true_conditions(world) == ROWS["progressing"]


def test_a_child_is_made_only_after_its_attempt_is_persisted() -> None:
    world = job()
    first = world.decide()
    assert first.actions == ()
    assert not first.settled
    world.write(first.status)
    start = next(action for action in world.decide().actions if isinstance(action, StartAttempt))
    assert start.attempt.id == f"{UID}/prepare/1"


def test_a_start_that_nobody_saw_is_made_again_with_the_same_number() -> None:
    world = job().settled()
    world.children.clear()
    again = [action for action in world.decide().actions if isinstance(action, StartAttempt)]
    assert [start.attempt for start in again] == [world.started[0].attempt]


def test_success_needs_the_report_as_well_as_the_pods() -> None:
    world = job().training()
    world.says(done=True, **world.product(Stage.TRAIN)).settled()
    assert not world.is_true(ConditionType.TRAINED)
    world.finishes().settled()
    assert world.is_true(ConditionType.TRAINED)


def test_training_without_a_verified_export_has_not_succeeded() -> None:
    world = job().training().says(done=True).finishes(with_report=False).settled().later(61).settled()
    assert not world.is_true(ConditionType.TRAINED)
    record = world.attempt(Stage.TRAIN, 1)
    assert (record.reason, record.counted) == ("no-report", True)
    assert "no verified export" in record.message


def test_pods_that_succeed_without_a_report_are_waited_for_a_while() -> None:
    world = job().training().finishes(with_report=False).settled()
    assert world.wakes() == 60
    world.later(59).settled()
    assert world.attempt(Stage.TRAIN, 1).outcome == "running"
    world.later(1).settled()
    assert "report channel" in world.attempt(Stage.TRAIN, 1).message


def test_a_report_of_another_attempt_is_not_listened_to() -> None:
    world = job().training().with_pod_failed("crash").all_ended().settled().gone().later(60).settled().running()
    world.reports[Stage.TRAIN, 1] = world.says(done=True, **world.product(Stage.TRAIN)).reports[Stage.TRAIN, 2]
    world.reports[Stage.TRAIN, 1] = world.reports[Stage.TRAIN, 1].model_copy(update={"attempt": f"{UID}/train/1"})
    del world.reports[Stage.TRAIN, 2]
    world.change(succeeded=True).settled()
    assert not world.is_true(ConditionType.TRAINED)


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


# Never two attempts


def test_evidence_is_recorded_before_the_child_is_deleted() -> None:
    world = job().training().with_pod_failed("crash", rank=1).all_ended()
    decision = world.decide()
    assert decision.actions == ()
    assert decision.status.attempts[-1].reason == "crash"
    world.write(decision.status)
    assert [type(a).__name__ for a in world.decide().actions] == ["DeleteChild"]


def test_the_next_attempt_waits_until_every_pod_of_the_last_is_gone() -> None:
    world = job().training().pod(1, terminating=True).with_pod_failed("preempted", rank=0).all_ended("preempted")
    world.pod(1, phase=PodPhase.RUNNING).later(200).settled().later(500).settled()
    assert len(world.started) == 2
    assert world.reason == "WaitingForPreviousAttempt"
    assert "train-1-" in world.message
    assert world.gone().later(60).settled().current == (Stage.TRAIN, 2)


def test_a_lost_node_holds_the_job_until_it_is_out_of_service() -> None:
    world = job().training().pod(2, node_lost=True, terminating=True).settled().later(200).settled().gone().later(500)
    world.settled()
    assert world.attempt(Stage.TRAIN, 1).reason == "node-lost"
    assert world.reason == "WaitingForPreviousAttempt"
    assert "node-2" in world.message
    key = (Stage.TRAIN, 1)
    lost = world.children[key]
    world.children[key] = replace(lost, pods=tuple(replace(p, out_of_service=True) for p in lost.pods))
    assert world.settled().current == (Stage.TRAIN, 2)


def test_what_a_queue_takes_back_waits_as_the_same_attempt_however_long_and_begins_anew_when_it_is_admitted() -> None:
    world = job(retry={"limit": 0}).training().says(progress=steps(10)).settled()
    world.with_pod_failed("preempted", rank=0).all_ended("preempted").change(failed=False, queued=True).settled()
    assert world.reason == "Queued"
    world.change(pods=()).settled().later(7 * 24 * 3600).settled()
    assert (world.reason, world.attempt(Stage.TRAIN, 1).outcome) == ("Queued", "running")
    seconds = world.status.active_seconds
    pods = tuple(Pod(f"train-1-{i}", i, node=f"node-{i}") for i in range(4))
    world.change(queued=False, pods=pods).running().settled().later(60).settled()
    assert (world.reason, world.attempt(Stage.TRAIN, 1).outcome) == ("Training", "running")
    world.finishes().settled()
    assert world.attempt(Stage.TRAIN, 1).outcome == "succeeded"
    assert world.status.active_seconds - seconds <= 60


def test_a_rank_that_failed_begins_the_end_although_the_child_still_runs() -> None:
    world = job().training().with_pod_failed("cuda-oom", rank=1).change(failed=False).settled()
    assert world.attempt(Stage.TRAIN, 1).exited is not None
    world.later(deadlines.SETTLE_SECONDS).settled()
    assert world.attempt(Stage.TRAIN, 1).reason == "cuda-oom"


def test_a_lost_nodes_attempt_is_concluded_when_the_others_have_ended_without_waiting_for_its_last_word() -> None:
    world = job().training().pod(2, node_lost=True, terminating=True).settled()
    assert world.attempt(Stage.TRAIN, 1).outcome == "running"
    world.all_ended_but(2).settled()
    assert world.attempt(Stage.TRAIN, 1).reason == "node-lost"
    assert world.later(500).settled().reason == "WaitingForPreviousAttempt"


def test_a_lost_nodes_attempt_is_concluded_soon_although_the_others_still_wait_for_it() -> None:
    world = job().training().pod(2, node_lost=True, terminating=True).settled()
    assert world.wakes() == deadlines.SETTLE_SECONDS
    world.later(deadlines.SETTLE_SECONDS).settled()
    assert world.attempt(Stage.TRAIN, 1).reason == "node-lost"


def test_a_node_that_comes_back_in_time_costs_nothing() -> None:
    world = job().training().pod(2, node_lost=True).settled().later(20).pod(2, node_lost=False).settled()
    assert world.attempt(Stage.TRAIN, 1).exited is None
    assert world.later(500).settled().current == (Stage.TRAIN, 1)


def test_a_child_left_by_an_older_job_of_the_name_is_never_adopted() -> None:
    world = job()
    world.strangers = (Child(Stage.PREPARE, 1, ours=False, succeeded=True),)
    world.settled()
    assert world.started == []
    assert "earlier job with this name" in world.message
    world.strangers = ()
    assert world.settled().current == (Stage.PREPARE, 1)


def test_an_attempt_whose_child_vanished_is_not_made_again_beside_an_older_job_of_the_name() -> None:
    world = job().preparing()
    world.children.clear()
    world.strangers = (Child(Stage.PREPARE, 1, ours=False),)
    started = len(world.started)
    assert world.settled().reason == "WaitingForOlderJob"
    assert len(world.started) == started


def test_a_child_without_a_record_is_deleted_and_waited_for() -> None:
    world = job().training()
    world.children[Stage.TRAIN, 7] = Child(Stage.TRAIN, 7, pods=(Pod("stray"),))
    world.settled()
    assert [(d.stage, d.number) for d in world.deleted] == [(Stage.TRAIN, 7)]


def test_a_child_deleted_from_outside_is_recorded_and_tried_again_uncounted() -> None:
    world = job().training()
    world.delete_child(Stage.TRAIN, 1)
    world.settled()
    record = world.attempt(Stage.TRAIN, 1)
    assert (record.reason, record.counted) == ("deleted", False)
    assert world.gone().later(60).settled().current == (Stage.TRAIN, 2)


# Out of memory


def test_an_out_of_memory_halves_the_rows_then_recomputes_then_does_not_fit() -> None:
    world = job(retry={"limit": 10}).training()
    told = [world.started[-1].attempt.micro_batch_tokens]
    while not world.is_true(ConditionType.FAILED):
        world.failed_for_good("cuda-oom", rank=1).gone().later(500).settled()
        if not world.is_true(ConditionType.FAILED):
            world.running().settled()
            told.append(world.started[-1].attempt.micro_batch_tokens)
    assert told == [8192, 4096, 2048, 1500, 1500]
    assert [r.activation_checkpointing for r in world.status.attempts[-2:]] == [None, True]
    assert world.reason == "DoesNotFit"


def test_a_crash_after_an_out_of_memory_keeps_the_smaller_rows() -> None:
    world = job().training().failed_for_good("cuda-oom").gone().later(500).settled().running().settled()
    world.failed_for_good("crash").gone().later(500).settled()
    assert world.started[-1].attempt.micro_batch_tokens == 4096


def test_a_plan_that_does_not_fit_ends_the_job_before_a_gpu_is_taken() -> None:
    def planner(spec: FineTuneJobSpec, model: ModelFacts, lengths: LengthFacts) -> Plan:
        return plan(fits=False, warnings=("Use qlora.",))

    world = job().preparing()
    world.planner = planner
    world.finishes().settled()
    assert true_conditions(world) == ROWS["failed"]
    assert (world.reason, world.condition(ConditionType.TRAINED).reason) == ("DoesNotFit", "DoesNotFit")
    assert "Use qlora." in world.message
    assert world.is_true(ConditionType.PREPARED)
    assert [start.attempt.stage for start in world.started] == [Stage.PREPARE]


def test_the_plan_is_made_again_after_the_topology_was_changed() -> None:
    def planner(spec: FineTuneJobSpec, model: ModelFacts, lengths: LengthFacts) -> Plan:
        return plan(fits=spec.topology.nodes > 4, micro_batch_tokens=spec.topology.nodes * 1000)

    world = job().preparing()
    world.planner = planner
    world.finishes().settled().with_spec(lambda wire: wire.update(topology={"nodes": 6})).retried("1").settled()
    assert world.current == (Stage.TRAIN, 1)
    assert world.started[-1].attempt.micro_batch_tokens == 6000


# Waiting


@pytest.mark.parametrize(
    ("kind", "reason"), [("Secret", "WaitingForSecret"), ("PersistentVolumeClaim", "WaitingForClaim")]
)
def test_what_is_missing_is_said_and_waited_for(kind: str, reason: str) -> None:
    world = job()
    world.missing["x"] = Missing(kind, "hf-read", "Secret hf-read does not exist.")  # type: ignore[arg-type]
    world.settled()
    assert (world.reason, world.message) == (reason, "Secret hf-read does not exist.")
    assert true_conditions(world) == ROWS["progressing"]
    assert world.started == []
    world.missing.clear()
    assert world.settled().current == (Stage.PREPARE, 1)


def test_a_start_that_quota_refuses_is_said_and_tried_again() -> None:
    world = job()
    world.refuse_starts = True
    world.settled().settled()
    assert world.reason == "WaitingForQuota"
    assert world.decide().requeue_after == 15
    world.refuse_starts = False
    world.settled()
    assert world.child.pods
    assert [record.number for record in world.status.attempts] == [1]


def test_pods_that_cannot_start_say_why() -> None:
    world = job().settled().pod(0, waiting="Image x:y cannot be pulled: not found.").settled()
    assert (world.reason, world.status.phase) == ("WaitingForPods", Phase.WAITING)
    assert "cannot be pulled" in world.message
    assert world.running().settled().reason == "Preparing"


def test_pods_that_a_quota_keeps_from_being_made_are_missed_after_half_a_minute() -> None:
    world = job().until(Stage.PREPARE).finishes().settled()
    pods = world.child.pods
    world.change(pods=pods[:1]).settled()
    assert (world.reason, world.wakes()) == ("Starting", 30)
    world.later(30).settled()
    assert (world.reason, world.message.startswith("1 of 4 pods have been created.")) == ("WaitingForPods", True)
    assert world.change(pods=pods).running().settled().reason == "Training"


def test_a_child_that_kueue_holds_back_is_queued() -> None:
    world = job(podTemplate={"queueName": "research"}).settled().change(queued=True).settled()
    assert (world.reason, world.status.phase) == ("Queued", Phase.QUEUED)
    assert "research" in world.message


def test_a_gang_that_never_becomes_whole_is_tried_again_uncounted() -> None:
    world = job().training()
    world = job().until(Stage.PREPARE).finishes().settled().running(0, 2).pod(1, waiting="0/9 nodes.").settled()
    wait = world.wakes()
    assert wait == 900
    record = world.later(wait).settled().attempt(Stage.TRAIN, 1)
    assert (record.reason, record.counted) == ("partial-gang", False)
    assert "2 of 4 pods" in record.message
    assert world.gone().later(60).settled().current == (Stage.TRAIN, 2)


def test_pods_that_all_wait_are_no_partial_gang() -> None:
    world = job().preparing().finishes().settled().later(90_000).settled()
    assert world.current == (Stage.TRAIN, 1)
    assert world.wakes() is None


# Hang


def silence(world: World) -> float:
    wait = world.wakes()
    assert wait is not None
    return wait


@pytest.mark.parametrize("stage", GPU_STAGES)
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


# Suspension


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_suspended_and_gone_on_with(stage: Stage) -> None:
    world = job().until(stage).suspended().settled()
    assert (world.status.phase, true_conditions(world)) == (Phase.SUSPENDING, ROWS["progressing"])
    world.gone().settled()
    assert (world.status.phase, true_conditions(world)) == (Phase.SUSPENDED, ROWS["suspended"])
    assert world.attempt(stage, 1).outcome == "suspended"
    assert world.wakes() is None
    world.suspended(False).settled()
    assert world.current == (stage, 2)
    assert not world.attempt(stage, 1).counted
    assert true_conditions(world.complete()) == ROWS["complete"]


def test_a_job_may_be_born_suspended() -> None:
    world = job(suspend=True).settled()
    assert true_conditions(world) == ROWS["suspended"]
    assert world.started == []


def test_a_checkpoint_made_on_the_way_out_is_still_taken_over() -> None:
    world = job().training().suspended().settled()
    report = world.reports.get((Stage.TRAIN, 1))
    assert report is None
    world.status.attempts[-1].outcome = "running"
    world.says(last_checkpoint=checkpoint(40, world.now))
    world.status.attempts[-1].outcome = "suspended"
    world.gone().settled()
    assert world.status.last_checkpoint == checkpoint(40, world.now)


def test_an_attempt_that_succeeded_before_suspension_has_succeeded() -> None:
    world = job().training().finishes().suspended().settled()
    assert world.is_true(ConditionType.TRAINED)
    assert true_conditions(world) == ROWS["suspended"]


def test_suspension_ends_a_backoff() -> None:
    world = job().training().failed_for_good("crash").gone().settled().suspended().settled()
    assert true_conditions(world) == ROWS["suspended"]
    assert world.suspended(False).settled().current == (Stage.TRAIN, 2)


# The way back


def test_a_refused_token_in_publish_waits_until_the_secret_changes() -> None:
    world = job().publishing().failed_for_good("no-access").gone().settled()
    assert true_conditions(world) == ROWS["progressing"]
    published = world.condition(ConditionType.PUBLISHED)
    assert (published.status, published.reason) == ("False", "WaitingForCredentials")
    assert world.later(90_000).settled().reason == "WaitingForCredentials"
    world.credentials_version = "2"
    assert world.settled().current == (Stage.PUBLISH, 2)
    assert world.attempt(Stage.TRAIN, 1).outcome == "succeeded"


def test_waiting_for_a_token_ends_with_the_deadline() -> None:
    world = job(timeouts={"activeDeadlineSeconds": 3600}).publishing().failed_for_good("no-access").gone().settled()
    wait = world.wakes()
    assert wait == 3600 - world.status.active_seconds
    world.later(wait).settled()
    assert (true_conditions(world), world.reason) == (ROWS["failed"], "DeadlineExceeded")


def test_a_local_run_does_not_wait_for_a_token() -> None:
    world = job()
    world.environment = Environment(local=True)
    world.publishing().failed_for_good("no-access")
    assert true_conditions(world) == ROWS["failed"]
    assert "export" in world.message


def test_the_retry_annotation_goes_on_where_it_failed_with_a_fresh_budget() -> None:
    world = job(retry={"limit": 0}).training().failed_for_good("crash")
    assert true_conditions(world) == ROWS["failed"]
    world.retried("a").settled().gone().settled()
    assert world.current == (Stage.TRAIN, 2)
    assert world.status.observed_retry == "a"
    assert [start.attempt.stage for start in world.started].count(Stage.PREPARE) == 1
    assert world.status.failures_counted.get("train", 0) == 0
    assert world.status.completion_time is None


def test_after_the_retry_annotation_the_backoff_begins_anew() -> None:
    world = job(retry={"limit": 3}).training()
    for _ in range(3):
        world.failed_for_good("crash").gone().later(500).settled().running().settled()
    world.failed_for_good("crash").retried("a").settled().gone().settled().running().settled()
    assert world.current == (Stage.TRAIN, 5)
    assert (world.failed_for_good("crash").gone().settled().wakes() or 0) <= 16


def test_the_same_annotation_is_acted_on_once() -> None:
    world = job(retry={"limit": 0}).training().failed_for_good("crash").retried("a").settled().gone().settled()
    world.running().settled().failed_for_good("crash")
    assert true_conditions(world.settled()) == ROWS["failed"]


def test_a_finished_job_does_nothing_on_retry() -> None:
    world = job().complete()
    started = len(world.started)
    world.retried("a").settled()
    assert true_conditions(world) == ROWS["complete"]
    assert len(world.started) == started


def test_an_annotation_that_a_job_is_born_with_asks_for_nothing() -> None:
    world = job().retried("a").training().failed_for_good("bad-data")
    assert true_conditions(world.settled()) == ROWS["failed"]


def test_a_refused_gate_fails_and_says_where_the_model_is() -> None:
    world = job()
    world.gate_passes = False
    world.complete()
    assert (true_conditions(world), world.reason) == (ROWS["failed"], "GateRefused")
    assert "The model is in export" in world.message
    assert world.is_true(ConditionType.EVALUATED)
    assert Stage.PUBLISH not in {start.attempt.stage for start in world.started}


def test_after_a_refused_gate_a_retry_evaluates_again() -> None:
    world = job()
    world.gate_passes = False
    world.complete()
    world.gate_passes = True
    assert true_conditions(world.retried("a").complete()) == ROWS["complete"]


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


# The status


def test_a_deleted_job_is_left_alone() -> None:
    world = job().training()
    world.deleting = True
    world.with_pod_failed("bad-data")
    decision = world.decide()
    assert (decision.actions, decision.events, decision.requeue_after) == ((), (), None)
    assert decision.status.to_wire() == world.status.to_wire()


def test_an_unreadable_spec_fails_a_new_job() -> None:
    world = job()
    world.invalid = "spec.tuning.method: what is lorra?"
    world.settled()
    assert (true_conditions(world), world.reason) == (ROWS["failed"], "BadSpec")


def test_an_unreadable_spec_leaves_a_running_job_alone() -> None:
    world = job().training()
    world.invalid = "spec.future: unknown"
    world.settled()
    assert (true_conditions(world), world.reason) == (ROWS["progressing"], "SpecUnreadable")
    assert world.deleted == []
    world.invalid = ""
    assert world.settled().reason == "Training"


def test_transition_times_change_only_with_the_status_of_a_condition() -> None:
    world = job().settled()
    then = world.condition(ConditionType.RECONCILING).last_transition_time
    world.later(1000).running().settled()
    assert world.condition(ConditionType.RECONCILING).reason == "Preparing"
    assert world.condition(ConditionType.RECONCILING).last_transition_time == then


def test_a_change_of_the_spec_is_observed_by_every_condition_even_at_the_end() -> None:
    world = job().complete().with_spec(lambda wire: wire.update(cleanup={"ttlSecondsAfterFinished": 60})).settled()
    assert world.status.observed_generation == 2
    assert {c.observed_generation for c in world.status.conditions} == {2}
    assert true_conditions(world) == ROWS["complete"]


def test_progress_is_shown_in_a_column() -> None:
    world = job().training().says(progress=steps(120), activity="training").settled()
    assert world.status.progress_text == "120/450 (26%)"
    assert world.status.activity == "training"


def test_deciding_twice_changes_nothing() -> None:
    world = job().training().says(progress=steps(3)).later(100).settled()
    once = world.decide()
    world.write(once.status)
    assert world.decide().status.to_wire() == once.status.to_wire()
