"""A table of decisions: what is observed, and what is recorded and done about it."""

from dataclasses import replace

import pytest
from tests.unit.finetune_operator.decision.world import (
    ROWS,
    STAGE_KINDS,
    UID,
    checkpoint,
    job,
    steps,
    true_conditions,
)

from finetune_api.base import STAGES, Stage
from finetune_api.status import ConditionType, Phase
from finetune_operator.decision import deadlines
from finetune_operator.decision.model import Child, DeleteChild, Environment, Pod, PodPhase, StartAttempt

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


# Never two attempts


def test_evidence_is_recorded_before_the_child_is_deleted() -> None:
    world = job().training().with_pod_failed("crash", rank=1).all_ended()
    decision = world.decide()
    assert decision.actions == ()
    assert decision.status.attempts[-1].reason == "crash"
    world.write(decision.status)
    assert [type(a).__name__ for a in world.decide().actions] == ["DeleteChild"]


def test_a_sidecar_that_keeps_running_holds_no_gpus() -> None:
    world = job().training().finishes()
    for rank in range(3):
        world.pod(rank, lingering="istio-proxy")
    decision = world.decide()
    world.write(decision.status)
    assert world.attempt(Stage.TRAIN, 1).outcome == "succeeded"
    (deletion, *_) = world.decide().actions
    assert isinstance(deletion, DeleteChild)
    assert "istio-proxy" in deletion.why


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
