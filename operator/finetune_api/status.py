"""The `status` of a FineTuneJob: what happened so far, as written by the operator or `finetune run`.

Only the decision writes it. Its size is bounded: the history keeps only the newest attempts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Stage, Time
from finetune_api.report import (
    CheckpointRef,
    Choice,
    DatasetFacts,
    Digests,
    ExportRef,
    FailureClass,
    Plan,
    Progress,
    Published,
    Results,
)


class ConditionType(StrEnum):
    """Six conditions of every job and one per stage."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    PREPARED = "Prepared"
    TRAINED = "Trained"
    EVALUATED = "Evaluated"
    PUBLISHED = "Published"


STAGE_CONDITION: dict[Stage, ConditionType] = {
    Stage.PREPARE: ConditionType.PREPARED,
    Stage.TRAIN: ConditionType.TRAINED,
    Stage.EVALUATE: ConditionType.EVALUATED,
    Stage.PUBLISH: ConditionType.PUBLISHED,
}


class Phase(StrEnum):
    """Summary for people. Programs must use conditions instead."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    BACKING_OFF = "BackingOff"
    WAITING = "Waiting"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Condition(ApiModel):
    """A Kubernetes condition."""

    type: ConditionType
    """Type of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=1024)]
    """Reason in CamelCase, for programs."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """Message for people."""
    last_transition_time: Time
    """Time at which `status` last changed."""
    observed_generation: int = 0
    """Generation of the resource that the condition refers to."""


class AttemptRecord(ApiModel):
    """An attempt in the history."""

    stage: Stage
    """The stage."""
    number: int
    """Number of the attempt within its stage."""
    started: Time
    """Time at which its child object was created."""
    running_since: Time | None = None
    """Time at which all its pods were running."""
    exited: Time | None = None
    """Time at which its pods were first seen to terminate. Their results are collected within a limited time."""
    ended: Time | None = None
    """Time at which its end was recorded."""
    outcome: Literal["running", "succeeded", "failed", "suspended"] = "running"
    """Outcome of the attempt."""
    reason: FailureClass | str | None = None
    """Failure class, or another reason for its end (evicted, node-lost, partial-gang, suspended)."""
    message: str = ""
    """Root cause, as a sentence."""
    rank: int | None = None
    """Rank that reported the failure that is the root cause; absent if no rank reported it."""
    counted: bool = False
    """Whether it counts towards `retry.limit`."""
    forgiven: bool = False
    """Whether `finetune.dev/retry` was set after it failed, so that retry limit and backoff no longer count it."""
    resumed_from_step: int | None = None
    """Step of the checkpoint that it resumed from."""
    micro_batch_tokens: int | None = None
    """Maximum tokens per packed sequence, if an out-of-memory error lowered it."""
    activation_checkpointing: bool | None = None
    """Whether an out-of-memory error enabled activation checkpointing."""


class Origin(ApiModel):
    """Origin of the results: versions, digests and seed."""

    model: str = ""
    """Repository and commit of the model, or path and digest."""
    datasets: dict[str, str] = {}
    """Repository and commit of each dataset, or path and digest."""
    image: str = ""
    """Trainer image, with digest."""
    config_digest: str = ""
    """SHA-256 of the run config."""
    versions: dict[str, str] = {}
    """Versions of the packages that computed the results."""
    seed: int | None = None
    """Training seed."""


class JobStatus(ApiModel):
    """Observed state of the job."""

    model_config = ApiModel.model_config | {"extra": "ignore"}

    observed_generation: int = 0
    """Generation of the spec that this status refers to."""
    phase: Phase = Phase.PENDING
    """Summary of the state in one word."""
    stage: Stage | None = None
    """Stage that is running or comes next."""
    conditions: list[Condition] = []
    """Conditions: Ready, Reconciling, Stalled, Complete, Failed, Suspended, and one per stage."""
    start_time: Time | None = None
    """Time at which the job was first reconciled."""
    completion_time: Time | None = None
    """Time at which the job ended."""
    progress: Progress | None = None
    """Progress of the running stage."""
    progress_text: str = ""
    """Progress as text, such as `120/450 (27%)`."""
    eta_text: str = ""
    """Estimated time until the end of the stage, such as `1h20m`."""
    activity: str = ""
    """Current activity in a few words."""
    attempts: Annotated[list[AttemptRecord], Field(max_length=50)] = []
    """Latest attempts, oldest first."""
    attempts_started: dict[str, int] = {}
    """Number of attempts started per stage, over the lifetime of the job."""
    failures_counted: dict[str, int] = {}
    """Number of counted failures per stage since the last reset by `finetune.dev/retry`."""
    retry_at: Time | None = None
    """Time at which the next attempt may start, while backing off."""
    waiting_since: Time | None = None
    """Time since which the job has been waiting for its user, for example for a Secret, a claim or a valid token."""
    credentials_seen: str = ""
    """State of the Secrets when a token was rejected. The job continues when it changes."""
    last_checkpoint: CheckpointRef | None = None
    """Latest published checkpoint."""
    plan: Plan | None = None
    """Estimate of what the job needs."""
    datasets: list[DatasetFacts] = []
    """What Prepare found in each dataset."""
    choices: dict[str, Choice] = {}
    """What was chosen for `auto` and unset fields, and why."""
    warnings: list[str] = []
    """Warnings for the user, as sentences."""
    export: ExportRef | None = None
    """The exported model on the run volume."""
    results: Results | None = None
    """Results of the evaluation."""
    metric_text: str = ""
    """Main metric of base and tuned model, such as `0.415 → 0.623`."""
    published: Published | None = None
    """Where the model was published."""
    digests: Digests = Digests()
    """Digests of what the stages left on the run volume. Later stages refuse anything else."""
    wandb_url: str = ""
    """URL of the W&B run."""
    active_seconds: int = 0
    """Running time in seconds over all attempts of all stages."""
    active_until: Time | None = None
    """Time up to which `activeSeconds` has been counted, while all pods run."""
    gpu_hours: float = 0.0
    """GPU-hours used so far."""
    price: float | None = None
    """Price of the GPU-hours, if a price is configured."""
    observed_retry: str = ""
    """Last handled value of the annotation `finetune.dev/retry`."""
    origin: Origin = Origin()
    """Origin of the results: versions, digests and seed."""

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of that type, if it was written yet."""
        return next((c for c in self.conditions if c.type is kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        """Whether that condition holds."""
        condition = self.condition(kind)
        return condition is not None and condition.status == "True"

    @classmethod
    def parse(cls, wire: dict[str, Any] | None) -> JobStatus:
        """The status of a resource; an absent one is an empty one."""
        return cls.model_validate(wire or {})
