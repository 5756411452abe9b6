"""What the next attempt waits for, and what an out-of-memory failure leaves for it."""

import pytest
from tests.unit.finetune_operator.decision.world import ROWS, job, plan, true_conditions

from finetune_api.base import Stage
from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ConditionType, Phase
from finetune_operator.decision.model import Missing

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
