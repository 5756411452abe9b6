"""The `status` of a FineTuneJob: what the operator (or `finetune run`) says happened.

Only the decision writes it. Bounded in size: attempt history keeps the newest entries.
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
    ExportRef,
    FailureClass,
    Plan,
    Progress,
    Published,
    Results,
)


class ConditionType(StrEnum):
    """The six conditions of every job and one a stage."""

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
    """One word for people; nothing may be decided by it."""

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
    """Which condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=1024)]
    """One word in CamelCase for programs."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """A sentence for people."""
    last_transition_time: Time
    """When `status` last changed."""
    observed_generation: int = 0
    """Generation of the resource that this was decided for."""


class AttemptRecord(ApiModel):
    """One attempt in the history."""

    stage: Stage
    """The stage."""
    number: int
    """Number of the attempt within the stage."""
    started: Time
    """When its child was made."""
    running_since: Time | None = None
    """When all its pods ran."""
    exited: Time | None = None
    """When its pods were first seen to end: what they left is read within a bounded time of it."""
    ended: Time | None = None
    """When its end was recorded."""
    outcome: Literal["running", "succeeded", "failed", "suspended"] = "running"
    """How it ended."""
    reason: FailureClass | str | None = None
    """Class of the failure, or what else ended it (evicted, node-lost, partial-gang, suspended)."""
    message: str = ""
    """The root cause in a sentence."""
    rank: int | None = None
    """Rank of the root cause."""
    counted: bool = False
    """Whether it uses up one of `retry.limit`."""
    forgiven: bool = False
    """Whether `finetune.dev/retry` was given after it failed: neither budget nor backoff counts it any more."""
    resumed_from_step: int | None = None
    """Step of the checkpoint it went on from."""
    micro_batch_tokens: int | None = None
    """Tokens a packed row at most, if an out-of-memory lowered it."""
    activation_checkpointing: bool | None = None
    """Whether an out-of-memory switched it on."""


class Origin(ApiModel):
    """Where every number comes from."""

    model: str = ""
    """Repository and commit, or path and digest."""
    datasets: dict[str, str] = {}
    """The same for each dataset."""
    image: str = ""
    """Trainer image with digest."""
    config_digest: str = ""
    """sha256 of the run config."""
    versions: dict[str, str] = {}
    """Versions of the packages that computed the result."""
    seed: int | None = None
    """Training seed."""


class JobStatus(ApiModel):
    """What happened so far."""

    model_config = ApiModel.model_config | {"extra": "ignore"}

    observed_generation: int = 0
    """Generation of the spec that this status is about."""
    phase: Phase = Phase.PENDING
    """One word for people."""
    stage: Stage | None = None
    """Stage that runs or comes next."""
    conditions: list[Condition] = []
    """Ready, Reconciling, Stalled, Complete, Failed, Suspended, and one a stage."""
    start_time: Time | None = None
    """When the job was first touched."""
    completion_time: Time | None = None
    """When it ended."""
    progress: Progress | None = None
    """How far the running stage is."""
    progress_text: str = ""
    """The same for a column: `120/450 (27%)`."""
    eta_text: str = ""
    """Time to the end of the stage, for a column: `1h20m`."""
    activity: str = ""
    """What is being done, in a few words."""
    attempts: Annotated[list[AttemptRecord], Field(max_length=50)] = []
    """Newest attempts, oldest first."""
    attempts_started: dict[str, int] = {}
    """Attempts started a stage, over the job's life."""
    failures_counted: dict[str, int] = {}
    """Counted failures a stage since its budget was last renewed."""
    retry_at: Time | None = None
    """When the next attempt may start, while backing off."""
    waiting_since: Time | None = None
    """Since when the job waits for something that only its user can give: a Secret, a claim, a better token."""
    credentials_seen: str = ""
    """State of the Secrets when a token was refused; the job goes on once it differs."""
    last_checkpoint: CheckpointRef | None = None
    """Newest published checkpoint."""
    plan: Plan | None = None
    """What the run needs."""
    datasets: list[DatasetFacts] = []
    """What Prepare found."""
    choices: dict[str, Choice] = {}
    """What each `auto` became, and why."""
    warnings: list[str] = []
    """Sentences for the user."""
    export: ExportRef | None = None
    """The trained model on the volume."""
    results: Results | None = None
    """The evaluation."""
    metric_text: str = ""
    """The headline for a column: `0.415 → 0.623`."""
    published: Published | None = None
    """Where the model went."""
    wandb_url: str = ""
    """Page of the W&B run."""
    active_seconds: int = 0
    """Running time over all attempts of all stages."""
    active_until: Time | None = None
    """Until when activeSeconds is counted, while all pods run."""
    gpu_hours: float = 0.0
    """GPU-hours used."""
    price: float | None = None
    """Their price, if one is configured."""
    observed_retry: str = ""
    """Value of the annotation finetune.dev/retry that was last acted on."""
    origin: Origin = Origin()
    """Where every number comes from."""

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
