"""What the operator tells the trainer: the resolved spec, where things lie, and which attempt this is.

The run config is written once per job and never changed; the attempt is given to each pod in the
environment variable `FINETUNE_ATTEMPT` as JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Stage
from finetune_api.known_datasets import KNOWN_DATASETS
from finetune_api.report import Digests, attempt_id
from finetune_api.spec import Columns, Dataset, FineTuneJobSpec, Splits
from finetune_api.traits import Task

CONFIG_VARIABLE = "FINETUNE_RUN_CONFIG"
"""Path of the run config."""
ATTEMPT_VARIABLE = "FINETUNE_ATTEMPT"
GPUS_VARIABLE = "FINETUNE_GPUS_PER_NODE"
"""How many GPUs the node was given: the topology may have changed since the run config was written."""
TOKENS_VARIABLE = "FINETUNE_TOKENS"
"""Directory with one file per token that the process may read, named by its kind."""
TERMINATION_VARIABLE = "FINETUNE_TERMINATION_LOG"
"""File that takes the failure; the kubelet's own where it is not set."""
REPORT_VARIABLE = "FINETUNE_REPORT_CONFIGMAP"
"""`<namespace>/<name>` of the ConfigMap that takes the report."""
RESUME_VARIABLE = "FINETUNE_RESUME_FROM"
"""Directory at which the claim of `training.resumeFrom` is mounted."""
RUN_CONFIG_FILE = "run-config.json"
FENCE_FILE = "fence.json"
REPORTS_DIRECTORY = "reports"
LOGS_DIRECTORY = "logs"
METRICS_FILE = "metrics/train.jsonl"
"""In the run directory, as the ones above."""


def attempt_name(stage: Stage, number: int) -> str:
    """Name of an attempt in the run directory: `reports/<name>.json`, `logs/<name>/`."""
    return f"{stage}-{number}"


TokenKind = Literal["hub", "publish", "wandb"]


class JobRef(ApiModel):
    """Which job this is."""

    namespace: str
    name: str
    uid: str


class Paths(ApiModel):
    """Absolute directories as the trainer sees them."""

    run: str
    """`<volume>/<namespace>/<name>/<uid>`: prepared/, checkpoints/, export/, evaluation/, reports/, logs/."""
    cache: str
    """Shared downloads and conversions, keyed by content."""
    source: str = ""
    """What relative `path:` sources are relative to: the cache volume, locally the job's file's directory."""


class RunConfig(ApiModel):
    """Immutable snapshot of everything that decides what the trainer computes."""

    job: JobRef
    """Which job this is."""
    spec: FineTuneJobSpec
    """The spec with every default that does not depend on device or data filled in."""
    paths: Paths
    """Where things lie."""
    image: str = ""
    """Image with digest, empty for local processes."""
    operator_version: str = ""
    """Version that made this snapshot."""


REPRODUCED = ("model", "datasets", "split", "tuning", "training", "topology", "evaluation")
"""Parts of the spec that decide the numbers; not credentials, volumes, pods and targets."""


def reproduced(spec: FineTuneJobSpec, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """The part of the spec that may be shown to everyone who sees the result."""
    wire = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=exclude_defaults)
    return {name: wire[name] for name in REPRODUCED if name in wire}


class Attempt(ApiModel):
    """One try at one stage. What differs between tries stands here and nowhere else."""

    uid: str
    """The job's uid."""
    stage: Stage
    """The stage."""
    number: Annotated[int, Field(ge=1)] = 1
    """1 for the first try; rises over the job's life, for each stage on its own."""
    micro_batch_tokens: int | None = None
    """Maximum tokens per packed sequence, halved after an out-of-memory error. If not set, the plan's."""
    activation_checkpointing: bool | None = None
    """Enabled after an out-of-memory error at the longest document."""
    grace_seconds: int = 120
    """Seconds between SIGTERM and SIGKILL: a collective checkpoint must fit."""
    startup_seconds: int = 900
    """Seconds for all ranks to connect."""
    hang_seconds: int = 1200
    """Seconds without a step after which a rank writes its stacks and exits."""
    report_to: Literal["file", "configmap"] = "file"
    """Where the report goes in addition to `reports/<stage>-<n>.json` in the run directory."""

    digests: Digests = Digests()
    """What earlier stages left, as they reported it."""

    @property
    def id(self) -> str:
        """The name by which fence and report know this attempt."""
        return attempt_id(self.uid, self.stage, self.number)


def _resolve_dataset(dataset: Dataset) -> Dataset:
    """What is known of the repository fills in what the user left out, field by field."""
    known = KNOWN_DATASETS.get(dataset.repo or "")
    if known is None or dataset.task not in (None, known.task):
        return dataset
    splits = dataset.splits if dataset.splits != Splits() else Splits.model_validate(dict(known.splits))
    columns = {**known.columns, **dataset.columns.model_dump(exclude_none=True)}
    return dataset.model_copy(
        update={"task": Task(known.task), "columns": Columns.model_validate(columns), "splits": splits}
    )


def resolve(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """The spec with every default filled in that follows from other fields (never from device or data)."""
    training, method = spec.training, spec.tuning.method.traits
    run = spec.storage.run
    datasets = [_resolve_dataset(dataset) for dataset in spec.datasets]
    several_tasks = len({dataset.task for dataset in datasets}) > 1
    reduction = ("example" if several_tasks else "token") if training.loss_reduction == "auto" else None
    made = "ReadWriteMany" if spec.topology.nodes > 1 else "ReadWriteOnce"
    access_mode = run.access_mode or (made if run.claim_name is None else None)
    return spec.model_copy(
        update={
            "datasets": datasets,
            "training": training.model_copy(
                update={
                    "learning_rate": training.learning_rate or method.default_learning_rate,
                    "loss_reduction": reduction or training.loss_reduction,
                    "packing": training.packing if method.can_pack else False,
                }
            ),
            "storage": spec.storage.model_copy(update={"run": run.model_copy(update={"access_mode": access_mode})}),
        }
    )
