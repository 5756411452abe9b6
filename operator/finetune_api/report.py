"""What the trainer tells the operator: one report per attempt, rewritten as a whole while the attempt runs.

On a cluster it is the data of the ConfigMap `<job>-<stage>-report`, locally a file `reports/<stage>-<n>.json` in the
run directory. A failing rank also writes its `Failure` to its termination message and to the volume.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Count, Stage, Time

MAX_REPORT_BYTES = 131072
"""A report is taken over into the status, which has to stay well below what the API server stores."""
MAX_LAYERS = 2000
MAX_SIZE = 1 << 24
"""Width, heads, experts or vocabulary of a model: far beyond any that exists, and harmless to compute with."""
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]


class FailureClass(StrEnum):
    """Why an attempt failed. The failure policy (decision/failure_policy.py) decides what follows from each."""

    BAD_SPEC = "bad-spec"
    """The spec cannot be run; `field` names the field."""
    BAD_DATA = "bad-data"
    """Rows, columns or labels are unusable; `field` names dataset, file and row."""
    NO_ACCESS = "no-access"
    """Missing or invalid token, terms not accepted, no write access, or no such repository."""
    DOES_NOT_FIT = "does-not-fit"
    """Out of memory even with the smallest micro-batch and activation checkpointing."""
    CUDA_OOM = "cuda-oom"
    """GPU memory ran out."""
    HOST_OOM = "host-oom"
    """The container's memory limit was reached."""
    PREEMPTED = "preempted"
    """Stopped from outside (SIGTERM) after a collective checkpoint."""
    HANG = "hang"
    """No step within `timeouts.hang`."""
    PEER = "peer"
    """Another rank failed first; never the root cause."""
    STORAGE_FULL = "storage-full"
    """No space left on the volume."""
    DIVERGED = "diverged"
    """The loss spiked again after two roll-backs."""
    EXPORT_DIFFERS = "export-differs"
    """The export, reloaded, does not compute what was trained."""
    HUB_UNAVAILABLE = "hub-unavailable"
    """The Hub did not answer, or answered 429 or 5xx after the client's own retries."""
    GATE_REFUSED = "gate-refused"
    """The gate refused the model: nothing was published."""
    CONFIG_CHANGED = "config-changed"
    """A checkpoint was written with a different training config."""
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
    FailureClass.EXPORT_DIFFERS: 79,
}
"""Exit code of the image's entrypoint per class (torchrun turns every code of its children into 1)."""


class Failure(ApiModel):
    """Why one rank failed: a sentence that a user can act on. Fits into a termination message (4,096 bytes)."""

    failure_class: Annotated[FailureClass, Field(alias="class")]
    """Failure class; determines what happens next."""
    sentence: Annotated[str, Field(max_length=2000)]
    """What is wrong and what to do. Never contains secrets."""
    field: str = ""
    """Field path, or dataset, file and row, that the failure refers to."""
    rank: Count | None = None
    """Global rank that failed."""
    time: Time
    """Time of the failure, used to find the first one among the ranks."""


class Choice(ApiModel):
    """What was chosen for an `auto` or unset field, and why."""

    value: str
    """What was chosen."""
    why: str
    """Reason, in a few words."""


class MetricValue(ApiModel):
    """A measured value."""

    metric: str
    """`<dataset>/<metric>`, such as `banking77/accuracy`, or `loss`."""
    value: float
    """The value."""
    step: Count | None = None
    """Optimizer step at which it was measured."""


class Progress(ApiModel):
    """Progress of the stage."""

    step: Count = 0
    """Completed optimizer steps. Other stages count rows, files or bytes, see `unit`."""
    total: Count = 0
    """Total number of steps; 0 while unknown."""
    unit: str = "steps"
    """Unit of `step` and `total`."""
    epoch: float | None = None
    """Passes over the data so far."""
    tokens_per_second: float | None = None
    """Non-padding tokens per second over all ranks, counting shared prefixes once for each example."""
    computed_tokens_per_second: float | None = None
    """Tokens per second that were actually computed, if shared prefixes are computed once."""
    eta_seconds: Count | None = None
    """Estimated seconds until the end of the stage."""
    loss: float | None = None
    """Training loss of the last step."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    grad_norm: float | None = None
    """Gradient norm before clipping."""
    validation: MetricValue | None = None
    """Latest validation."""


class CheckpointRef(ApiModel):
    """A published checkpoint."""

    step: Count
    """Optimizer step."""
    path: str
    """Path relative to the run directory."""
    time: Time
    """Time at which it was published."""


class MemoryComponent(ApiModel):
    """A component of the memory plan."""

    name: str
    """Name, such as weights, gradients, optimizer or activations."""
    bytes: Count
    """Bytes per rank at the peak."""


class Plan(ApiModel):
    """Estimate of what the job needs, made before a GPU is requested."""

    world_size: Count
    """Number of ranks."""
    steps: Count
    """Total number of optimizer steps."""
    examples: Count
    """Training examples per epoch."""
    tokens: Count
    """Total number of training tokens."""
    tokens_per_rank_step: Count
    """Mean number of tokens per rank and step."""
    trainable_parameters: Count
    """Number of trained parameters."""
    parameters: Count
    """Number of parameters."""
    micro_batch_tokens: Count
    """Maximum number of tokens per packed sequence."""
    micro_batches: Count = 1
    """Number of packed sequences that a rank computes, one after another, per step."""
    activation_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass, because the spec says so or to save memory."""
    memory: list[MemoryComponent] = []
    """Peak memory per rank, by component."""
    memory_bytes: Count = 0
    """Peak memory per rank in total."""
    host_bytes: Count = 0
    """Peak host memory per pod, from loading and from copies for checkpoints."""
    device_bytes: Count | None = None
    """Memory of the GPU, if known."""
    fits: bool | None = None
    """Whether the job fits, if the GPU is known."""
    flops: float = 0.0
    """Floating-point operations of the training in total."""
    device: str = ""
    """GPU type that time and price refer to; empty if unknown."""
    utilisation: float | None = None
    """Fraction of that GPU's peak speed that `hours` assumes."""
    hours: float | None = None
    """Hours of training on that GPU."""
    price: float | None = None
    """Price of the GPU-hours, if a price is configured."""
    warnings: list[str] = []
    """Warnings, as sentences."""


class LinearLayers(ApiModel):
    """Linear layers of one name and size, or stacked experts, which adapters may reach."""

    name: Annotated[str, Field(max_length=200)]
    """Full name, `*` in place of the layer's number."""
    out: Size
    """Rows of the matrix."""
    into: Size
    """Columns."""
    layers: Annotated[list[Annotated[int, Field(ge=0, lt=MAX_LAYERS)]], Field(max_length=MAX_LAYERS)] = []
    """Layers that have it; all if empty."""
    stacked: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    """Matrices in one parameter, each with a rank of its own; 0 for a module."""
    left_out: bool = False
    """Whether `all-linear` does not reach it."""


class ModelFacts(ApiModel):
    """Shape of the base model, from which the memory plan is computed (names as in `config.json`)."""

    architecture: str
    """Class name, such as `LlamaForCausalLM`."""
    hidden_size: Size
    """Width of the residual stream."""
    intermediate_size: Size
    """Width of the MLP."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    """Layers."""
    num_attention_heads: Size
    """Query heads."""
    num_key_value_heads: Size
    """Key and value heads."""
    head_dim: Size
    """Dimension of each head."""
    vocab_size: Size
    """Size of the vocabulary."""
    tie_word_embeddings: bool
    """Whether head and embedding share their weights."""
    attention_bias: bool = False
    """Whether q, k and v (and o for Llama) have biases."""
    max_position_embeddings: Count = 0
    """Maximum context length; 0 if unknown."""
    parameters: Count
    """Number of parameters; tied ones count once."""
    num_experts: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    """Experts per layer; 0 for dense models."""
    experts_per_token: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    """Experts per token; 0 for dense models or if unknown."""
    linear_layers: Annotated[list[LinearLayers], Field(max_length=64)] = []
    """Of an architecture whose layers are not named or sized like Llama's; empty for others."""


class LengthFacts(ApiModel):
    """Lengths of the rendered training documents, in tokens."""

    documents: Count
    """Training documents per epoch."""
    tokens: Count
    """Tokens in total."""
    longest: Count
    """Tokens of the longest document."""
    labelled: Count
    """Tokens in the loss."""


class DatasetFacts(ApiModel):
    """What Prepare found in a dataset."""

    name: str
    """Name of the dataset in the spec."""
    source: str
    """Repository and commit, or path and SHA-256."""
    rows: Count
    """Number of usable rows."""
    bad_rows: Count = 0
    """Number of unusable rows, which are skipped."""
    train: Count = 0
    """Training rows."""
    validation: Count = 0
    """Validation rows."""
    test: Count = 0
    """Rows held out for the final evaluation."""
    labels: Count | None = None
    """Number of distinct labels, for classification."""
    notes: list[str] = []
    """Notes about splits, duplicates, contamination and truncation."""


class Interval(ApiModel):
    """A value with its paired bootstrap interval."""

    value: float
    """The estimate."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""


class MetricResult(ApiModel):
    """A metric on a dataset: base model, tuned model, and the paired difference."""

    dataset: str
    """Name of the dataset; `macro` for the mean over datasets."""
    metric: str
    """Name of the metric, such as accuracy, f1, rouge-l or neg-loss."""
    rows: Count
    """Number of scored rows."""
    primary: bool = False
    """Whether the gate uses this metric."""
    base: float | None = None
    """Value of the untuned model."""
    tuned: float
    """Value of the tuned model."""
    difference: Interval | None = None
    """Tuned minus base model, on the same rows."""
    baselines: dict[str, float] = {}
    """Values of the baselines, such as majority, tfidf-logreg or few-shot."""


class GateOutcome(ApiModel):
    """Verdict of the gate."""

    passed: bool
    """Whether the model may be published."""
    reason: str
    """One of improved, not-significant, worse, below-minimum, undecided, not-asked and not-measured."""
    sentence: str
    """The verdict as a sentence."""


class Results(ApiModel):
    """Results of the evaluation."""

    split: str
    """Rows that were evaluated: test, or the half of validation that nothing was selected on."""
    metrics: list[MetricResult]
    """One entry per dataset and metric; the macro-mean is last."""
    gate: GateOutcome
    """Verdict of the gate."""
    export_digest: str
    """Digest of the evaluated export."""
    report: str = "evaluation/report.html"
    """Path relative to the run directory."""


class ExportRef(ApiModel):
    """The model written by Train, verified after writing."""

    path: str = "export"
    """Path relative to the run directory."""
    digest: str
    """SHA-256 over the names and digests of the files."""
    format: str
    """One of adapter, merged and model."""
    size_bytes: Count
    """Size of all files in bytes."""
    step: Count
    """Step of the exported weights."""


class ExportProbe(ApiModel):
    """The trained model's loss on a few prepared documents, with which Evaluate compares the export's."""

    split: Literal["train", "validation"]
    """Where the documents are."""
    documents: Annotated[list[Count], Field(max_length=64)]
    """Their numbers in the store."""
    tokens: Count
    """Tokens that are predicted: all of the documents but the first of each."""
    loss: float
    """Mean over these tokens, in nats."""


class Published(ApiModel):
    """Where the model was published."""

    repo: str | None = None
    """Hub repository."""
    path: str | None = None
    """Directory."""
    commit: str = ""
    """Commit id on the Hub."""
    url: str = ""
    """URL of the model's page."""
    digest: str
    """Digest of the published export."""


Digest = Annotated[str, Field(max_length=100)]


class Digests(ApiModel):
    """SHA-256 of what the stages left on the run volume: later stages refuse anything else."""

    prepared: Digest = ""
    """From Prepare: of `prepared/manifest.json`."""
    export: Digest = ""
    """From Train: over the names and digests of the files of `export/`."""
    results: Digest = ""
    """From Evaluate: of `evaluation/results.json`."""


class Report(ApiModel):
    """The latest state of one attempt."""

    attempt: str
    """`<job uid>/<stage>/<n>`; reports of another attempt are ignored."""
    stage: Stage
    """The stage."""
    time: Time
    """Time at which it was written."""
    activity: str = ""
    """Current activity in a few words, such as `downloading model` or `compiling`."""
    done: bool = False
    """Whether the attempt succeeded and all its results are durable."""
    progress: Progress = Progress()
    """Progress of the stage."""
    resumed_from_step: Count | None = None
    """Step of the checkpoint that this attempt resumed from."""
    last_checkpoint: CheckpointRef | None = None
    """Latest published checkpoint."""
    plan: Plan | None = None
    """From Prepare."""
    datasets: list[DatasetFacts] = []
    """From Prepare."""
    model: ModelFacts | None = None
    """From Prepare: input of the plan."""
    lengths: LengthFacts | None = None
    """From Prepare: input of the plan."""
    choices: dict[str, Choice] = {}
    """What was chosen for `auto` and unset fields."""
    warnings: list[str] = []
    """Warnings for the user, as sentences."""
    export: ExportRef | None = None
    """From Train."""
    probe: ExportProbe | None = None
    """From Train: what the export is checked with."""
    results: Results | None = None
    """From Evaluate."""
    published: Published | None = None
    """From Publish."""
    digests: Digests = Digests()
    """From Prepare, Train and Evaluate, each its own."""
    wandb_url: str = ""
    """URL of the W&B run."""
    origin: dict[str, Any] = {}
    """Model and dataset revisions, digests, versions, seed."""
    failure: Failure | None = None
    """Why the attempt ended, if it failed."""


def attempt_id(uid: str, stage: Stage, number: int) -> str:
    """The id of an attempt in the fence and in reports: `<job uid>/<stage>/<n>`."""
    return f"{uid}/{stage}/{number}"
