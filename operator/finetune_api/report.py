"""What the trainer tells the operator: one report an attempt, rewritten whole as the attempt goes on.

On a cluster it is the data of the ConfigMap `<job>-report`, locally a file `reports/<stage>-<n>.json` in the
run directory. A failing rank also writes its `Failure` to its termination message and to the volume.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.base import ApiModel, Stage, Time


class FailureClass(StrEnum):
    """Why an attempt failed. What follows from each is the failure policy's business (decision/failure_policy.py)."""

    BAD_SPEC = "bad-spec"
    """The spec cannot be carried out; `field` names the field."""
    BAD_DATA = "bad-data"
    """Rows, columns or labels are unusable; `field` names dataset, file and row."""
    NO_ACCESS = "no-access"
    """Token missing or wrong, consent not given, no write access, no such repository."""
    DOES_NOT_FIT = "does-not-fit"
    """Out of memory with the smallest micro-batch and activation checkpointing."""
    CUDA_OOM = "cuda-oom"
    """GPU memory ran out."""
    HOST_OOM = "host-oom"
    """The container's memory limit was reached."""
    PREEMPTED = "preempted"
    """Stopped from outside (SIGTERM) after a collective checkpoint."""
    HANG = "hang"
    """No step within the limit."""
    PEER = "peer"
    """Another rank failed first; never the root cause."""
    STORAGE_FULL = "storage-full"
    """No space left on the volume."""
    DIVERGED = "diverged"
    """The loss spiked again after two roll-backs."""
    HUB_UNAVAILABLE = "hub-unavailable"
    """The Hub did not answer or answered 429/5xx beyond the client's own retries."""
    GATE_REFUSED = "gate-refused"
    """Evaluated, and not better: nothing was published."""
    CONFIG_CHANGED = "config-changed"
    """A checkpoint was made with another training config."""
    FENCED = "fenced"
    """A newer attempt holds the volume."""
    CRASH = "crash"
    """Anything else."""


EXIT_CODES: dict[FailureClass, int] = {
    FailureClass.CRASH: 1,
    FailureClass.BAD_SPEC: 64,
    FailureClass.BAD_DATA: 65,
    FailureClass.NO_ACCESS: 66,
    FailureClass.DOES_NOT_FIT: 67,
    FailureClass.CUDA_OOM: 68,
    FailureClass.HOST_OOM: 69,
    FailureClass.PREEMPTED: 70,
    FailureClass.HANG: 71,
    FailureClass.PEER: 72,
    FailureClass.STORAGE_FULL: 73,
    FailureClass.DIVERGED: 74,
    FailureClass.HUB_UNAVAILABLE: 75,
    FailureClass.GATE_REFUSED: 76,
    FailureClass.CONFIG_CHANGED: 77,
    FailureClass.FENCED: 78,
}
"""Exit code of the image's entrypoint for each class (torchrun turns every code of its children into 1)."""


class Failure(ApiModel):
    """Why one rank failed: a sentence a user can act on. Fits a termination message (4096 bytes)."""

    failure_class: Annotated[FailureClass, Field(alias="class")]
    """Class that the failure policy decides by."""
    sentence: Annotated[str, Field(max_length=2000)]
    """What is wrong and what to do, without secrets."""
    field: str = ""
    """Field path, or dataset, file and row, that it is about."""
    rank: int | None = None
    """Global rank that failed."""
    time: Time
    """When, so that the earliest root cause is found among the ranks."""


class Choice(ApiModel):
    """What an `auto` became on this device and data, and why."""

    value: str
    """What was chosen."""
    why: str
    """The reason, in a few words."""


class MetricValue(ApiModel):
    """One measured value."""

    metric: str
    """`<dataset>/<metric>`, such as `banking77/accuracy`, or `loss`."""
    value: float
    """The value."""
    step: int | None = None
    """Optimiser step it was measured at."""


class Progress(ApiModel):
    """How far the stage is."""

    step: int = 0
    """Optimiser steps done (rows, files or bytes in the other stages, see `unit`)."""
    total: int = 0
    """Steps in all; 0 while unknown."""
    unit: str = "steps"
    """What `step` counts."""
    epoch: float | None = None
    """Passes over the mixture so far."""
    tokens_per_second: float | None = None
    """Non-padding tokens a second over all ranks, as if every example was computed whole."""
    computed_tokens_per_second: float | None = None
    """Tokens a second that were computed, where examples share prefixes that are computed once."""
    eta_seconds: int | None = None
    """Seconds to the end of the stage, estimated."""
    loss: float | None = None
    """Training loss of the last step."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    grad_norm: float | None = None
    """Gradient norm before clipping."""
    validation: MetricValue | None = None
    """Newest validation."""


class CheckpointRef(ApiModel):
    """A published checkpoint."""

    step: int
    """Optimiser step."""
    path: str
    """Relative to the run directory."""
    time: Time
    """When it was published."""


class MemoryComponent(ApiModel):
    """One line of the memory plan."""

    name: str
    """weights, gradients, optimizer, activations, …"""
    bytes: int
    """Bytes a rank at the peak."""


class Plan(ApiModel):
    """What the run needs, before a GPU is taken."""

    world_size: int
    """Ranks in all."""
    steps: int
    """Optimiser steps in all."""
    examples: int
    """Training examples an epoch."""
    tokens: int
    """Training tokens in all."""
    tokens_per_rank_step: int
    """Mean tokens a rank computes each step."""
    trainable_parameters: int
    """Parameters that are trained."""
    parameters: int
    """Parameters in all."""
    micro_batch_tokens: int
    """Tokens in one packed row at most."""
    micro_batches: int = 1
    """Rows that a rank computes one after the other in each step."""
    activation_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass: as the spec says, or because memory needs it."""
    memory: list[MemoryComponent] = []
    """Peak memory a rank, by component."""
    memory_bytes: int = 0
    """Peak memory a rank in all."""
    host_bytes: int = 0
    """Main memory of one pod at the peak: loading, and copies for checkpoints."""
    device_bytes: int | None = None
    """Memory of the device, if known."""
    fits: bool | None = None
    """Whether it fits, if the device is known."""
    flops: float = 0.0
    """Floating-point operations of the training."""
    device: str = ""
    """GPU that time and price are about; empty where it is not known."""
    utilisation: float | None = None
    """Share of that GPU's peak speed that the hours assume."""
    hours: float | None = None
    """Hours of training on the named GPU."""
    price: float | None = None
    """Price of those GPU-hours, if a price is known."""
    warnings: list[str] = []
    """Sentences, such as `12 steps in all`."""


class ModelFacts(ApiModel):
    """Shape of the base model: what the memory plan is computed from (names as in `config.json`)."""

    architecture: str
    """Class name, such as `LlamaForCausalLM`."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the MLP."""
    num_hidden_layers: int
    """Layers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    vocab_size: int
    """Rows of the embedding."""
    tie_word_embeddings: bool
    """Whether the head shares the embedding."""
    attention_bias: bool = False
    """Biases on q, k, v (and o for Llama)."""
    max_position_embeddings: int = 0
    """Longest context; 0 unknown."""
    parameters: int
    """Parameters in all, tied ones once."""
    num_experts: int = 0
    """Experts a layer; 0 for dense models."""
    experts_per_token: int = 0
    """Experts that one token goes through; 0 for dense models or where unknown."""


class LengthFacts(ApiModel):
    """How long the rendered training documents are, in tokens."""

    documents: int
    """Training documents an epoch of the mixture."""
    tokens: int
    """Their tokens."""
    longest: int
    """Tokens of the longest."""
    labelled: int
    """Tokens that carry a label."""
    estimated: bool = False
    """Estimated from characters, not counted."""


class DatasetFacts(ApiModel):
    """What Prepare found in one dataset."""

    name: str
    """The dataset's name in the spec."""
    source: str
    """Repository and commit, or path and sha256."""
    rows: int
    """Usable rows."""
    bad_rows: int = 0
    """Rows left out as unusable."""
    train: int = 0
    """Rows to train on."""
    validation: int = 0
    """Rows for validation."""
    test: int = 0
    """Rows held out to the end."""
    labels: int | None = None
    """Distinct labels of a classification."""
    notes: list[str] = []
    """Sentences about splits, duplicates, contamination, truncation."""


class Interval(ApiModel):
    """A value with its paired bootstrap interval."""

    value: float
    """The estimate."""
    low: float
    """Lower end, 95%."""
    high: float
    """Upper end, 95%."""


class MetricResult(ApiModel):
    """One metric on one dataset: before, after, and whether the difference is real."""

    dataset: str
    """The dataset's name; `macro` for the mean over datasets."""
    metric: str
    """accuracy, f1, rouge-l, neg-loss, …"""
    rows: int
    """Rows scored."""
    primary: bool = False
    """The metric that the gate reads."""
    base: float | None = None
    """Untuned model."""
    tuned: float
    """Tuned model."""
    difference: Interval | None = None
    """Tuned minus base on the same rows."""
    baselines: dict[str, float] = {}
    """majority, tfidf-logreg, few-shot, …"""


class GateOutcome(ApiModel):
    """What the gate said."""

    passed: bool
    """Whether the model may be published."""
    reason: str
    """improved, not-significant, worse, below-minimum, undecided or not-asked."""
    sentence: str
    """The same for a reader."""


class Results(ApiModel):
    """The evaluation."""

    split: str
    """Which rows: test, or the unseen half of validation."""
    metrics: list[MetricResult]
    """One line a dataset and metric, the macro-mean last."""
    gate: GateOutcome
    """What the gate said."""
    export_digest: str
    """Digest of the export that was evaluated."""
    report: str = "evaluation/report.html"
    """Relative to the run directory."""


class ExportRef(ApiModel):
    """The model that Train wrote, verified after writing."""

    path: str = "export"
    """Relative to the run directory."""
    digest: str
    """sha256 over the files' names and digests."""
    format: str
    """adapter, merged or model."""
    size_bytes: int
    """Bytes of all files."""
    step: int
    """Step whose weights it holds."""


class Published(ApiModel):
    """Where the model went."""

    repo: str | None = None
    """Hub repository."""
    path: str | None = None
    """Directory."""
    commit: str = ""
    """Commit id on the Hub."""
    url: str = ""
    """Page of the model."""
    digest: str
    """Digest of the export that was uploaded."""


class Report(ApiModel):
    """Everything one attempt has to say, newest state."""

    attempt: str
    """`<job uid>/<stage>/<n>`; reports of another attempt are ignored."""
    stage: Stage
    """The stage."""
    time: Time
    """When it was written."""
    activity: str = ""
    """What is being done now, in a few words: `downloading model`, `compiling`."""
    done: bool = False
    """The attempt succeeded and everything it promises is durable."""
    progress: Progress = Progress()
    """How far it is."""
    resumed_from_step: int | None = None
    """Step of the checkpoint that this attempt went on from."""
    last_checkpoint: CheckpointRef | None = None
    """Newest published checkpoint."""
    plan: Plan | None = None
    """From Prepare."""
    datasets: list[DatasetFacts] = []
    """From Prepare."""
    model: ModelFacts | None = None
    """From Prepare: what the operator makes the plan from."""
    lengths: LengthFacts | None = None
    """From Prepare: what the operator makes the plan from."""
    choices: dict[str, Choice] = {}
    """What each `auto` became."""
    warnings: list[str] = []
    """Sentences for the user."""
    export: ExportRef | None = None
    """From Train."""
    results: Results | None = None
    """From Evaluate."""
    published: Published | None = None
    """From Publish."""
    wandb_url: str = ""
    """Page of the W&B run."""
    origin: dict[str, Any] = {}
    """Model and dataset revisions, digests, versions, seed."""
    failure: Failure | None = None
    """Why the attempt ended, if it failed."""


def attempt_id(uid: str, stage: Stage, number: int) -> str:
    """The fence's and the report's name of an attempt: `<job uid>/<stage>/<n>`."""
    return f"{uid}/{stage}/{number}"
