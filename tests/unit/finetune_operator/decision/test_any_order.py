"""Random events in any order, an operator that crashes anywhere: what must hold whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.finetune_operator.decision.world import World, checkpoint, job, steps

from finetune_api.base import STAGES, Stage
from finetune_api.report import FailureClass
from finetune_api.status import STAGE_CONDITION, ConditionType, JobStatus
from finetune_operator.decision.model import Child, DeleteChild, Missing, Pod, PodPhase, StartAttempt

CLASSES = st.sampled_from([str(kind) for kind in FailureClass])
RANKS = st.integers(0, 3)
ROWS = [
    {ConditionType.RECONCILING},
    {ConditionType.SUSPENDED},
    {ConditionType.READY, ConditionType.COMPLETE},
    {ConditionType.STALLED, ConditionType.FAILED},
]
STAGE_KINDS = set(STAGE_CONDITION.values())


class AnyOrder(RuleBasedStateMachine):
    """One job, its cluster, its user, and an operator that may stop after any of its calls."""

    world: World

    @initialize(limit=st.integers(0, 2), deadline=st.booleans(), start=st.sampled_from([None, *STAGES]))
    def a_job(self, limit: int, deadline: bool, start: Stage | None) -> None:
        """A new job, or one whose stages have gone well so far."""
        timeouts = {"activeDeadlineSeconds": 20_000} if deadline else {}
        self.world = job(retry={"limit": limit}, timeouts=timeouts)
        self.asked = 0
        if start is not None:
            self.world.until(start)

    @initialize(strangers=st.booleans())
    def an_older_job_of_the_name(self, strangers: bool) -> None:
        if strangers and hasattr(self, "world"):
            self.world.strangers = (Child(Stage.PREPARE, 1, ours=False),)

    # The operator

    @rule(crash=st.sampled_from(["no", "before the write", "write refused", "after the write", "after one action"]))
    def reconciles(self, crash: str) -> None:
        world = self.world
        decision = world.decide()
        if crash in ("before the write", "write refused"):
            return
        self._check_write(decision.status)
        world.write(decision.status)
        if crash == "after the write":
            return
        for count, action in enumerate(decision.actions):
            if crash == "after one action" and count == 1:
                return
            self._check_action(action)
            world.act(action)

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        self._one_good_round()

    @precondition(lambda self: self._running())
    @rule(kind=CLASSES, rank=RANKS, pods_go=st.booleans())
    def an_attempt_fails_and_time_passes(self, kind: str, rank: int, pods_go: bool) -> None:
        world = self.world
        if world.child.exists and not world.child.succeeded:
            world.running()
            self.reconciles_to_rest()
        if self._running() and self._has_pod(rank):
            world.with_pod_failed(kind, rank=rank)
            self.reconciles_to_rest()
            world.later(200)
            self.reconciles_to_rest()
            if pods_go:
                world.gone()
            self.reconciles_to_rest()
            world.later(1000)
            self.reconciles_to_rest()

    @rule()
    def the_older_job_goes(self) -> None:
        self.world.strangers = ()

    @rule()
    def reconciles_to_rest(self) -> None:
        for _ in range(10):
            self.reconciles(crash="no")
        before = self.world.status.to_wire()
        assert self.world.decide().status.to_wire() == before, "deciding again changes what was just decided"
        self._check_not_stuck()

    def _check_write(self, new: JobStatus) -> None:
        old = self.world.status
        if old.is_true(ConditionType.COMPLETE):
            assert new.is_true(ConditionType.COMPLETE)
        if old.is_true(ConditionType.FAILED) and new.observed_retry == old.observed_retry:
            assert new.is_true(ConditionType.FAILED)
        for stage in STAGES:
            before, after = old.attempts_started.get(stage, 0), new.attempts_started.get(stage, 0)
            assert after in (before, before + 1), "attempts are numbered one by one"
            if after > before:
                assert not self._may_write(), "a new attempt while another may write"
        known = {(r.stage, r.number): r for r in new.attempts}
        for record in old.attempts[1:]:
            kept = known[record.stage, record.number]
            if record.outcome != "running":
                assert (kept.outcome, kept.reason, kept.message) == (record.outcome, record.reason, record.message)

    def _check_action(self, action: object) -> None:
        status = self.world.status
        if isinstance(action, StartAttempt):
            record = next(r for r in reversed(status.attempts) if r.outcome == "running")
            assert (record.stage, record.number) == (action.attempt.stage, action.attempt.number)
            assert not self._may_write() - {(record.stage, record.number)}
            assert not self.world.strangers, "an older job of the name may still write"
            assert not self.world.spec.suspend
        if isinstance(action, DeleteChild):
            found = [r for r in status.attempts if (r.stage, r.number) == (action.stage, action.number)]
            assert all(r.outcome in ("failed", "suspended") for r in found), "destroyed before it was recorded"

    def _may_write(self) -> set[tuple[Stage, int]]:
        """Attempts that have a pod which may write to the volume."""
        return {
            key
            for key, child in self.world.children.items()
            if any(p.phase in (PodPhase.RUNNING, PodPhase.PENDING) and not p.out_of_service for p in child.pods)
        }

    def _check_not_stuck(self) -> None:
        """The job has ended, or rests by its user's wish, or something will bring it on: a clock, pods, a wait."""
        world = self.world
        status = world.status
        if status.is_true(ConditionType.COMPLETE) or status.is_true(ConditionType.FAILED):
            return
        if status.is_true(ConditionType.SUSPENDED) and world.spec.suspend:
            return
        waits = world.reason.startswith("WaitingFor") or world.reason in ("Queued", "Suspending")
        alive = self._running() and any(p.phase in (PodPhase.PENDING, PodPhase.RUNNING) for p in world.child.pods)
        broken = self._running() and (world.child.failed or world.child.succeeded)
        alive = alive and not broken
        assert world.decide().requeue_after is not None or waits or alive, world.reason

    # The cluster

    def _running(self) -> bool:
        return hasattr(self, "world") and any(
            r.outcome == "running" and (r.stage, r.number) in self.world.children for r in self.world.status.attempts
        )

    def _has_pod(self, rank: int) -> bool:
        return any(p.node_rank == rank and p.phase is PodPhase.RUNNING for p in self.world.child.pods)

    @precondition(_running)
    @rule(ranks=st.sets(RANKS))
    def pods_run(self, ranks: set[int]) -> None:
        if self.world.child.exists:
            self.world.running(*ranks)

    @precondition(_running)
    @rule(kind=CLASSES, rank=RANKS, others=st.booleans())
    def a_rank_fails(self, kind: str, rank: int, others: bool) -> None:
        if self._has_pod(rank):
            self.world.with_pod_failed(kind, rank=rank)
            if others:
                self.world.all_ended()

    @precondition(_running)
    @rule(rank=RANKS, how=st.sampled_from(["evicted", "node_lost", "oom_killed", "terminating", "silent"]))
    def a_pod_is_disturbed(self, rank: int, how: str) -> None:
        if self._has_pod(rank):
            if how == "silent":
                self.world.with_pod_silent(rank, exit_code=139)
            else:
                self.world.pod(rank, **{how: True})

    @precondition(_running)
    @rule()
    def the_node_comes_back(self) -> None:
        for pod in self.world.child.pods:
            self.world.pod(pod.node_rank, node_lost=False)

    @precondition(_running)
    @rule(step=st.integers(1, 400))
    def it_reports(self, step: int) -> None:
        self.world.says(progress=steps(step), last_checkpoint=checkpoint(step, self.world.now))

    @precondition(_running)
    @rule(reports=st.booleans())
    def it_succeeds(self, reports: bool) -> None:
        child = self.world.child
        whole = all(p.phase is PodPhase.RUNNING and not p.terminating for p in child.pods)
        if child.exists and not child.failed and child.pods and whole:
            self.world.finishes(with_report=reports)

    @precondition(_running)
    @rule()
    def the_child_is_deleted_from_outside(self) -> None:
        self.world.delete_child(*self.world.current)

    @precondition(_running)
    @rule(queued=st.booleans())
    def kueue_holds_it_back(self, queued: bool) -> None:
        if all(p.phase is PodPhase.PENDING for p in self.world.child.pods):
            self.world.change(queued=queued)

    @precondition(_running)
    @rule()
    def kueue_takes_it_back(self) -> None:
        child = self.world.child
        if child.exists and not child.failed and not child.succeeded:
            self.world.change(queued=True, pods=tuple(Pod(p.name, p.node_rank, node=p.node) for p in child.pods))

    @rule()
    def deleted_pods_go(self) -> None:
        self.world.gone()

    @rule()
    def lost_nodes_are_marked_out_of_service(self) -> None:
        for key, child in self.world.children.items():
            pods = tuple(replace(p, out_of_service=p.out_of_service or p.node_lost) for p in child.pods)
            self.world.children[key] = replace(child, pods=pods)

    @rule(kind=st.sampled_from(["Secret", "PersistentVolumeClaim"]), there=st.booleans())
    def something_is_missing(self, kind: str, there: bool) -> None:
        if there:
            self.world.missing.pop(kind, None)
        else:
            self.world.missing[kind] = Missing(kind, "x", f"{kind} x does not exist.")  # type: ignore[arg-type]

    @rule(refuse=st.booleans())
    def quota(self, refuse: bool) -> None:
        self.world.refuse_starts = refuse

    # The user and the time

    @rule(seconds=st.sampled_from([1, 9, 61, 150, 1000, 30_000]))
    def time_passes(self, seconds: int) -> None:
        self.world.later(seconds)

    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        self.world.suspended(value)

    @rule()
    def retry(self) -> None:
        self.asked += 1
        self.world.retried(str(self.asked))

    @rule()
    def the_token_changes(self) -> None:
        self.world.credentials_version += "x"

    @rule(passes=st.booleans())
    def the_gate(self, passes: bool) -> None:
        self.world.gate_passes = passes

    # What must always hold

    @invariant()
    def conditions_are_a_row_of_the_table(self) -> None:
        if hasattr(self, "world") and self.world.status.conditions:
            true = {c.type for c in self.world.status.conditions if c.status == "True"} - STAGE_KINDS
            assert true in ROWS
            assert {c.type for c in self.world.status.conditions} == set(ConditionType)

    @invariant()
    def one_attempt_may_write(self) -> None:
        if hasattr(self, "world"):
            assert len(self._may_write()) <= 1

    @invariant()
    def one_attempt_is_open(self) -> None:
        if hasattr(self, "world"):
            assert sum(r.outcome == "running" for r in self.world.status.attempts) <= 1

    @invariant()
    def counted_failures_are_bounded(self) -> None:
        if hasattr(self, "world"):
            limit = self.world.spec.retry.limit
            assert all(count <= limit + 1 for count in self.world.status.failures_counted.values())

    @invariant()
    def the_status_is_bounded(self) -> None:
        if hasattr(self, "world"):
            assert len(self.world.status.attempts) <= 50

    def teardown(self) -> None:
        """Once the world is kind again, the job comes to an end."""
        if hasattr(self, "world"):
            self._be_kind()
            for _ in range(60):
                if self._over():
                    return
                self._one_good_round()
            raise AssertionError(f"stuck: {self.world.reason}: {self.world.message}")

    def _over(self) -> bool:
        status = self.world.status
        return status.is_true(ConditionType.COMPLETE) or status.is_true(ConditionType.FAILED)

    def _be_kind(self) -> None:
        world = self.world
        world.missing.clear()
        world.strangers = ()
        world.refuse_starts, world.gate_passes = False, True
        world.credentials_version += "kind"
        world.suspended(False)
        self.lost_nodes_are_marked_out_of_service()

    def _one_good_round(self) -> None:
        world = self.world
        for _ in range(6):
            self.reconciles(crash="no")
        if world.reason in ("WaitingForUser", "WaitingForCredentials"):
            world.credentials_version += "better"  # what is waited for was only asked for now
        world.gone()
        if self._running() and not world.child.failed and not world.child.succeeded and world.child.exists:
            world.change(queued=False)
            if any(p.terminating or p.phase is PodPhase.FAILED for p in world.child.pods):
                world.all_ended() if world.child.pods else world.change(failed=True)
            else:
                world.running()
                self.reconciles(crash="no")
                if self._running():
                    world.finishes()
        wait = world.decide().requeue_after
        world.later(wait or 1)


AnyOrder.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_order = pytest.mark.timeout(600)(AnyOrder.TestCase)
