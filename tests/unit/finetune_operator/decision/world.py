"""A simulated cluster with one job in it: children, pods, reports, and an operator that may crash anywhere.

Fluent, so that a test shows only what matters: `job().training().with_pod_failed("cuda-oom", rank=3).settled()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from finetune_api.base import Stage
from finetune_api.report import (
    CheckpointRef,
    ExportRef,
    Failure,
    FailureClass,
    GateOutcome,
    LengthFacts,
    MetricResult,
    ModelFacts,
    Plan,
    Progress,
    Published,
    Report,
    Results,
    attempt_id,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import STAGE_CONDITION, AttemptRecord, Condition, ConditionType, JobStatus
from finetune_operator.decision.decide import decide
from finetune_operator.decision.model import (
    RETRY_ANNOTATION,
    Action,
    Child,
    CleanUp,
    Decision,
    DeleteChild,
    EnsureShared,
    Environment,
    Event,
    Missing,
    Observation,
    Planner,
    Pod,
    PodPhase,
    StartAttempt,
)
from finetune_operator.decision.next_attempt import with_plan

UID = "0d6f2c"
BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
SPEC: dict[str, object] = {
    "model": {"path": "models/llama"},
    "datasets": [{"name": "claims", "path": "claims.csv", "task": "classification"}],
    "tuning": {"method": "lora"},
    "topology": {"nodes": 4, "gpusPerNode": 2},
    "publish": {"repo": "acme/support"},
}
MODEL_FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=256,
    tie_word_embeddings=True,
    parameters=100_000,
)
LENGTHS = LengthFacts(documents=1000, tokens=100_000, longest=1500, labelled=4000)


def plan(fits: bool | None = True, micro_batch_tokens: int = 8192, warnings: tuple[str, ...] = ()) -> Plan:
    return Plan(
        world_size=8,
        steps=450,
        examples=1000,
        tokens=100_000,
        tokens_per_rank_step=1000,
        trainable_parameters=1000,
        parameters=100_000,
        micro_batch_tokens=micro_batch_tokens,
        fits=fits,
        warnings=list(warnings),
    )


@dataclass
class World:
    """Everything outside the operator, and the status as persisted."""

    spec: FineTuneJobSpec
    status: JobStatus = field(default_factory=JobStatus)
    now: datetime = BEGINNING
    generation: int = 1
    annotations: dict[str, str] = field(default_factory=dict)
    deleting: bool = False
    invalid: str = ""
    children: dict[tuple[Stage, int], Child] = field(default_factory=dict)
    strangers: tuple[Child, ...] = ()
    reports: dict[tuple[Stage, int], Report] = field(default_factory=dict)
    unusable_reports: dict[Stage, str] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)
    refuse_starts: bool = False
    credentials_version: str = "1"
    environment: Environment = field(default_factory=lambda: Environment(price_per_gpu_hour=2.0))
    planner: Planner | None = None
    gate_passes: bool = True
    writes: int = 0
    events: list[Event] = field(default_factory=list)
    started: list[StartAttempt] = field(default_factory=list)
    deleted: list[DeleteChild] = field(default_factory=list)
    cleaned: int = 0

    # The operator

    def observe(self) -> Observation:
        return Observation(
            namespace="ml",
            name="support",
            uid=UID,
            generation=self.generation,
            spec=self.spec,
            status=JobStatus.parse(self.status.to_wire()),
            now=self.now,
            annotations=dict(self.annotations),
            deleting=self.deleting,
            invalid=self.invalid,
            children=(*self.children.values(), *self.strangers),
            reports=tuple(self.reports.values()),
            unusable_reports=self.unusable_reports,
            missing=tuple(self.missing.values()),
            credentials_version=self.credentials_version,
            environment=self.environment,
        )

    def decide(self) -> Decision:
        observation = self.observe()
        return decide(with_plan(observation, self.planner) if self.planner else observation)

    def write(self, status: JobStatus) -> None:
        if status.to_wire() != self.status.to_wire():
            self.status = JobStatus.parse(status.to_wire())
            self.writes += 1

    def act(self, action: Action) -> None:
        if isinstance(action, StartAttempt):
            self._start(action)
        elif isinstance(action, DeleteChild):
            self.deleted.append(action)
            self.delete_child(action.stage, action.number)
        elif isinstance(action, CleanUp):
            self.cleaned += 1
            self.children.clear()
        else:
            assert isinstance(action, EnsureShared)

    def step(self) -> Decision:
        """One reconcile without accidents."""
        decision = self.decide()
        self.write(decision.status)
        self.events.extend(decision.events)
        for action in decision.actions:
            self.act(action)
        return decision

    def settled(self) -> World:
        """Reconcile until nothing more is written or done at this moment."""
        for _ in range(30):
            before = (self.status.to_wire(), len(self.started), len(self.deleted), self.cleaned)
            decision = self.step()
            if before == (self.status.to_wire(), len(self.started), len(self.deleted), self.cleaned):
                return self
            if self.refuse_starts and decision.settled:
                return self
        raise AssertionError("never comes to rest")

    def wakes(self) -> float | None:
        """When the settled operator wants to look again."""
        return self.settled().decide().requeue_after

    # The cluster

    def _start(self, action: StartAttempt) -> None:
        attempt = action.attempt
        key = (attempt.stage, attempt.number)
        self.started.append(action)
        if key in self.children:
            return
        if self.refuse_starts:
            self.missing["quota"] = Missing("Quota", "gpus", "Quota gpus is exceeded.")
            return
        self.missing.pop("quota", None)
        expected = self.spec.topology.nodes if attempt.stage is Stage.TRAIN else 1
        pods = tuple(Pod(f"{attempt.stage}-{attempt.number}-{i}", i, node=f"node-{i}") for i in range(expected))
        self.children[key] = Child(*key, created=self.now, pods=pods, pods_expected=expected)

    def delete_child(self, stage: Stage, number: int) -> None:
        child = self.children.get((stage, number))
        if child is not None:
            pods = tuple(replace(pod, terminating=True) for pod in child.pods)
            self.children[stage, number] = replace(child, exists=False, deleting=True, pods=pods)

    def gone(self) -> World:
        """Pods that are being deleted go, but for those on lost nodes."""
        for key, child in list(self.children.items()):
            pods = tuple(pod for pod in child.pods if not pod.terminating or (pod.node_lost and not pod.out_of_service))
            if not child.exists and not pods:
                del self.children[key]
            elif pods != child.pods:
                self.children[key] = replace(child, pods=pods, failed=child.failed or child.exists)
        return self

    @property
    def current(self) -> tuple[Stage, int]:
        """The attempt that runs."""
        record = next(record for record in reversed(self.status.attempts) if record.outcome == "running")
        return record.stage, record.number

    @property
    def child(self) -> Child:
        return self.children[self.current]

    def change(self, **what: object) -> World:
        key = self.current
        self.children[key] = replace(self.children[key], **what)  # type: ignore[arg-type]
        return self

    def pod(self, index: int, **what: object) -> World:
        pods = tuple(replace(p, **what) if p.node_rank == index else p for p in self.child.pods)  # type: ignore[arg-type]
        return self.change(pods=pods)

    def running(self, *indices: int) -> World:
        """Those pods run (all when none is named)."""
        for pod in self.child.pods:
            if pod.phase is PodPhase.PENDING and (not indices or pod.node_rank in indices):
                self.pod(pod.node_rank, phase=PodPhase.RUNNING, started=self.now, waiting="")
        return self

    def with_pod_failed(self, kind: str = "crash", rank: int = 0, sentence: str = "", **what: object) -> World:
        """A rank fails with a termination message, and the child with it."""
        failure = Failure(
            failure_class=FailureClass(kind), sentence=sentence or f"rank {rank}: {kind}", rank=rank, time=self.now
        )
        facts: dict[str, object] = {"phase": PodPhase.FAILED, "failure": failure, "finished": self.now, "exit_code": 1}
        self.pod(rank, **(facts | what))
        return self.change(failed=True)

    def with_pod_silent(self, rank: int = 0, **what: object) -> World:
        """A rank fails without a word."""
        self.pod(rank, **({"phase": PodPhase.FAILED, "finished": self.now} | what))
        return self.change(failed=True)

    def all_ended(self, kind: str = "peer") -> World:
        """The other ranks follow."""
        for pod in self.child.pods:
            if pod.phase is PodPhase.RUNNING:
                self.with_pod_failed(kind, rank=pod.node_rank)
        return self

    def all_ended_but(self, index: int) -> World:
        """The other ranks follow, but for one that says nothing."""
        for pod in self.child.pods:
            if pod.node_rank != index:
                self.with_pod_failed("peer", rank=pod.node_rank)
        return self

    def says(self, **fields: object) -> World:
        """The running attempt reports."""
        stage, number = self.current
        before = self.reports.get((stage, number))
        base = {} if before is None else dict(before)
        made = base | {"attempt": attempt_id(UID, stage, number), "stage": stage, "time": self.now} | fields
        self.reports[stage, number] = Report.model_validate(made)
        return self

    def finishes(self, with_report: bool = True) -> World:
        """Every pod of the running attempt succeeds, and the report says so."""
        if with_report:
            self.says(done=True, **self.product(self.current[0]))
        for pod in self.child.pods:
            self.pod(pod.node_rank, phase=PodPhase.SUCCEEDED, finished=self.now, exit_code=0)
        return self.change(succeeded=True)

    def product(self, stage: Stage) -> dict[str, object]:
        """What the report of a finished stage names."""
        if stage is Stage.PREPARE:
            return {"model": MODEL_FACTS, "lengths": LENGTHS} | ({} if self.planner else {"plan": plan()})
        if stage is Stage.TRAIN:
            return {"export": ExportRef(digest="sha256:abc", format="adapter", size_bytes=10, step=450)}
        if stage is Stage.EVALUATE:
            row = MetricResult(dataset="claims", metric="accuracy", rows=300, primary=True, base=0.415, tuned=0.623)
            words = "improved" if self.gate_passes else "worse"
            gate = GateOutcome(passed=self.gate_passes, reason=words, sentence=f"The model {words}.")
            return {"results": Results(split="test", metrics=[row], gate=gate, export_digest="sha256:abc")}
        url = "https://hub.example/acme/support"
        return {"published": Published(repo="acme/support", commit="c0ffee", url=url, digest="sha256:abc")}

    # The user and the time

    def later(self, seconds: float) -> World:
        self.now += timedelta(seconds=seconds)
        return self

    def with_spec(self, change: Callable[[dict[str, object]], object]) -> World:
        wire = self.spec.to_wire()
        change(wire)
        self.spec = FineTuneJobSpec.model_validate(wire)
        self.generation += 1
        return self

    def suspended(self, value: bool = True) -> World:
        return self.with_spec(lambda wire: wire.update(suspend=value))

    def retried(self, value: str) -> World:
        self.annotations = self.annotations | {RETRY_ANNOTATION: value}
        return self

    # Where the story is

    def until(self, stage: Stage) -> World:
        """All goes well until the stage's attempt runs."""
        for _ in range(8):
            self.settled().running().settled()
            if self.current[0] is stage:
                return self
            self.finishes()
        raise AssertionError(f"{stage} is never reached")

    def preparing(self) -> World:
        return self.until(Stage.PREPARE)

    def training(self) -> World:
        return self.until(Stage.TRAIN)

    def evaluating(self) -> World:
        return self.until(Stage.EVALUATE)

    def publishing(self) -> World:
        return self.until(Stage.PUBLISH)

    def complete(self) -> World:
        """All goes well to the end."""
        for _ in range(8):
            self.settled()
            if self.is_true(ConditionType.COMPLETE) or self.is_true(ConditionType.FAILED):
                return self
            self.running().settled().finishes()
        raise AssertionError("never ends")

    def failed_for_good(self, kind: str = "bad-data", rank: int = 0) -> World:
        return self.with_pod_failed(kind, rank=rank).all_ended().settled()

    def is_true(self, kind: ConditionType) -> bool:
        return self.status.is_true(kind)

    def condition(self, kind: ConditionType) -> Condition:
        found = self.status.condition(kind)
        assert found is not None
        return found

    @property
    def reason(self) -> str:
        return self.condition(ConditionType.READY).reason

    @property
    def message(self) -> str:
        return self.condition(ConditionType.READY).message

    def attempt(self, stage: Stage, number: int) -> AttemptRecord:
        return next(r for r in self.status.attempts if r.stage is stage and r.number == number)


def job(**spec: object) -> World:
    """A new job on four nodes that publishes; fields of the spec may be replaced."""
    return World(FineTuneJobSpec.model_validate(SPEC | spec))


def checkpoint(step: int, now: datetime) -> CheckpointRef:
    return CheckpointRef(step=step, path=f"checkpoints/step-{step:08d}", time=now)


def steps(done: int, total: int = 450) -> Progress:
    return Progress(step=done, total=total, loss=1.5)


ROWS: dict[str, set[ConditionType]] = {
    "progressing": {ConditionType.RECONCILING},
    "suspended": {ConditionType.SUSPENDED},
    "complete": {ConditionType.READY, ConditionType.COMPLETE},
    "failed": {ConditionType.STALLED, ConditionType.FAILED},
}
STAGE_KINDS = set(STAGE_CONDITION.values())


def true_conditions(world: World) -> set[ConditionType]:
    return {c.type for c in world.status.conditions if c.status == "True"} - STAGE_KINDS
