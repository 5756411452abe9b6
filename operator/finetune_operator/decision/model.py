"""What a decision is made from (Observation) and what it consists of (Decision). Values only.

Cluster and local runner both make an Observation, call `decide`, write `Decision.status` and carry out
`Decision.actions` only if that write was accepted (or was not needed). `decide` itself gives actions only when
the status it was shown holds their conclusion already: after each write, observe and decide again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from finetune_api.base import Stage
from finetune_api.report import Failure, LengthFacts, ModelFacts, Plan, Report, attempt_id
from finetune_api.runconfig import Attempt
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AttemptRecord, JobStatus

RETRY_ANNOTATION = "finetune.dev/retry"
Planner = Callable[[FineTuneJobSpec, ModelFacts, LengthFacts], Plan]
"""Makes the memory plan from what Prepare found (sizing/plan.py)."""


@dataclass(frozen=True)
class PlanFailure:
    """Why no memory plan can be made."""

    sentence: str
    """Without a full stop."""


class PodPhase(StrEnum):
    """Phase of a pod, or of a local process group standing in for one."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class Pod:
    """One pod of an attempt."""

    name: str
    node_rank: int = 0
    phase: PodPhase = PodPhase.PENDING
    terminating: bool = False
    """A deletionTimestamp is set: it may still be writing."""
    evicted: bool = False
    """Preempted, evicted, drained or shut down by the kubelet: not the job's fault."""
    over_own_limit: bool = False
    """Evicted because it exceeded a limit of its own, as of ephemeral storage."""
    refused: bool = False
    """The kubelet did not admit it: none of the trainer's containers ran."""
    node_lost: bool = False
    """Its node is not ready or gone."""
    out_of_service: bool = False
    """Its node carries the out-of-service taint: it cannot write any more."""
    oom_killed: bool = False
    memory_limit: str = ""
    exit_code: int | None = None
    failure: Failure | None = None
    """Termination message, if the trainer wrote one."""
    message: str = ""
    """What the kubelet says about its end."""
    lingering: str = ""
    """A container of somebody else that still runs although the trainer's have ended."""
    waiting: str = ""
    """Why it does not start, in a sentence: image, Secret, claim, unschedulable."""
    started: datetime | None = None
    """When its container began to run."""
    finished: datetime | None = None
    """When its container ended."""
    node: str = ""
    """Name of its node."""

    @property
    def ended(self) -> bool:
        """Whether it can do nothing any more."""
        return self.phase in (PodPhase.SUCCEEDED, PodPhase.FAILED) or self.out_of_service

    @property
    def abandoned(self) -> bool:
        """Whether the cluster has given it up with its node: it never says how it ended, but may still write."""
        return self.node_lost and self.terminating


@dataclass(frozen=True)
class Child:
    """The object that runs one attempt: a batch/v1 Job, a PyTorchJob or a local process group."""

    stage: Stage
    number: int
    ours: bool = True
    """Owned by this uid. False: left over from a job of the same name that is being deleted."""
    succeeded: bool = False
    failed: bool = False
    deleting: bool = False
    queued: bool = False
    """Suspended by another controller (Kueue) until it is admitted."""
    exists: bool = True
    """False: the object is gone but pods of it are still there."""
    foreign: str = ""
    """Kind of the object, if it is one of another backend, from before the operator's was changed: known by its pods
    alone, and not ours to delete."""
    message: str = ""
    created: datetime | None = None
    pods: tuple[Pod, ...] = ()
    pods_expected: int = 1

    @property
    def all_run(self) -> bool:
        """Whether every pod runs (or has run to its end): running time counts from here."""
        return sum(pod.phase in (PodPhase.RUNNING, PodPhase.SUCCEEDED) for pod in self.pods) >= self.pods_expected


@dataclass(frozen=True)
class Missing:
    """Something that the stage needs and that is not there yet: shown on the status and waited for.

    A missing Secret or claim keeps an attempt from being recorded. The others were found while starting one, which
    is tried again: a webhook that does not answer, a quota, a remainder of an earlier job with this name, a refusal
    of the API server.
    """

    kind: Literal["Secret", "PersistentVolumeClaim", "Webhook", "Quota", "Leftover", "Refused"]
    name: str
    sentence: str


@dataclass(frozen=True)
class Environment:
    """What the operator's settings and the place of execution add to a job."""

    local: bool = False
    image: str = ""
    operator_version: str = ""
    price_per_gpu_hour: float | None = None
    backoff_base_seconds: float = 10.0
    backoff_cap_seconds: float = 300.0
    hang_backstop_factor: float = 2.0
    grace_seconds: int = 120
    gang_scheduling: bool = False
    """Whether pods of a gang are scheduled all or none: PyTorchJobs then carry a scheduling policy."""
    gpus_per_node: int = 1
    """What `topology.gpusPerNode` means when it is left out: 1, locally the GPUs that are there."""


@dataclass(frozen=True)
class Observation:
    """Everything one decision may know."""

    namespace: str
    name: str
    uid: str
    generation: int
    spec: FineTuneJobSpec
    """Means nothing when `invalid`."""
    status: JobStatus
    """As persisted, never as we wish it were."""
    now: datetime
    annotations: dict[str, str] = field(default_factory=dict)
    deleting: bool = False
    invalid: str = ""
    """Why the spec cannot be read at all, in a sentence; empty when it can."""
    unreadable: str = ""
    """Why the persisted status cannot be read, in a sentence: nothing is done about the job then."""
    children: tuple[Child, ...] = ()
    reports: tuple[Report, ...] = ()
    """Newest report of each attempt that is on the volume or in the report ConfigMap."""
    unusable_reports: Mapping[Stage, str] = field(default_factory=dict)
    """By stage, why its report was set aside: it is not what a trainer writes."""
    plan: Plan | PlanFailure | None = None
    """The memory plan, made before the decision where next_attempt.plan_inputs asks for one."""
    missing: tuple[Missing, ...] = ()
    credentials_version: str = ""
    """Changes when a referenced Secret changes: a job that waits for a better token goes on."""
    environment: Environment = Environment()

    @cached_property
    def wire(self) -> dict[str, Any]:
        """The persisted status as it is on the wire; made once, and not to be changed."""
        return self.status.to_wire()

    def report_of(self, stage: Stage, number: int) -> Report | None:
        """The report of one attempt."""
        name = attempt_id(self.uid, stage, number)
        return next((report for report in self.reports if report.attempt == name), None)

    def running(self, record: AttemptRecord) -> RunningAttempt:
        """A running attempt with what is seen of it; children and reports of any other are not looked at."""
        key = (record.stage, record.number)
        child = next((child for child in self.children if child.ours and (child.stage, child.number) == key), None)
        return RunningAttempt(record, child, self.report_of(*key), self.unusable_reports.get(record.stage, ""))


@dataclass(frozen=True)
class RunningAttempt:
    """The attempt that runs or is about to be started."""

    record: AttemptRecord
    """Its record in the status being drafted, which is brought up to date in place."""
    child: Child | None
    """What runs it; None until that is created."""
    report: Report | None
    """Its newest report."""
    report_problem: str = ""
    """Why there is none although something was reported."""


@dataclass(frozen=True)
class EnsureShared:
    """Create what all stages share (run config, report, RBAC, claims, network policy), if absent."""


@dataclass(frozen=True)
class StartAttempt:
    """Create the child of one attempt."""

    attempt: Attempt


@dataclass(frozen=True)
class DeleteChild:
    """Delete the child of one attempt; its conclusion is in the persisted status already."""

    stage: Stage
    number: int
    why: str


@dataclass(frozen=True)
class CleanUp:
    """Delete the children of a finished job, after its TTL."""


Action = EnsureShared | StartAttempt | DeleteChild | CleanUp


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event, emitted once at a transition."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What to record, and then what to do."""

    status: JobStatus
    wire: dict[str, Any]
    """The status as it is on the wire."""
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    settled: bool = True
    """Whether the persisted status already holds these conclusions. If not, there are no actions yet: write the
    status, then observe and decide again."""
    requeue_after: float | None = None
    """Seconds after which a settled decision may change although nothing is seen to change."""
    waits_for_removal: bool = False
    """Whether something of an earlier attempt, or of an earlier job with this name, must go before anything starts."""
