"""The `spec` of a FineTuneJob: what a user asks for. Only model, datasets and tuning.method are required.

The CRD, the reference page and the run config are made from these models. A field that may be left out
to let the trainer choose says so in its description; what was chosen, and why, is in the report.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel, Duration, Fraction, Name, Quantity, RepoId, Rule

Path = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Text = Annotated[str, StringConstraints(max_length=20_000)]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=200)]

ONE_SOURCE = Rule(
    "has(self.repo) != has(self.path)",
    "give exactly one of repo (a Hub repository) and path (a file or directory)",
)


class Task(StrEnum):
    """What one dataset teaches; decides how its rows become prompts and how they are scored."""

    CLASSIFICATION = "classification"
    MULTIPLE_CHOICE = "multiple-choice"
    QUESTION_ANSWERING = "question-answering"
    CHAT = "chat"
    SUMMARIZATION = "summarization"
    TEXT = "text"


class Method(StrEnum):
    """How the model is tuned."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    PROMPT = "prompt"
    PREFIX = "prefix"


class Source(ApiModel):
    """Where a model, adapter or dataset comes from."""

    repo: RepoId | None = None
    """Repository on the Hub, as `owner/name`."""
    revision: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "main"
    """Branch, tag or commit of `repo`. Prepare resolves it to a commit once; every attempt uses that commit."""
    path: Path | None = None
    """File or directory instead of `repo`; on a cluster relative to the cache volume, locally to the job's file."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (ONE_SOURCE,)


class Adapter(Source):
    """A LoRA adapter to go on training from."""


class Model(Source):
    """The base model."""

    adapter: Adapter | None = None
    """Continue training this LoRA adapter instead of starting a new one."""
    attention: Literal["auto", "sdpa", "flex", "flash", "varlen", "eager"] = "auto"
    """Attention kernel. `auto` takes the fastest that keeps packed documents apart on this device."""
    chat_template: Text | None = None
    """Jinja chat template used instead of the tokenizer's own, in training, evaluation and the export."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's repository. Off unless you have read that code."""


class Columns(ApiModel):
    """Which column of the data holds what. A column left out is looked for under its usual names."""

    text: ColumnName | None = None
    """Text to classify, or the document for task `text`."""
    label: ColumnName | None = None
    """Label of a classification: a name, or an integer with names in the dataset's features."""
    question: ColumnName | None = None
    """Question of multiple choice or question answering."""
    choices: ColumnName | None = None
    """List of choices, or CommonsenseQA's `{label: [...], text: [...]}`."""
    answer: ColumnName | None = None
    """Answer: letter, index or text for multiple choice; text, list of texts or SQuAD's `{text: [...]}` for QA."""
    context: ColumnName | None = None
    """Passage that the question is about."""
    messages: ColumnName | None = None
    """List of `{role, content}` turns."""
    document: ColumnName | None = None
    """Text to summarise."""
    summary: ColumnName | None = None
    """Reference summary."""


class Splits(ApiModel):
    """Names of the dataset's own splits to use. A split that is not named is cut from `train`."""

    train: str = "train"
    """Split to train on."""
    validation: str | None = None
    """Split for validation, instead of a share cut from train."""
    test: str | None = None
    """Held-out split for the final evaluation."""


class Dataset(Source):
    """One dataset of the mixture."""

    name: Name
    """Short unique name; metrics are called `<name>/<metric>`."""
    config: str | None = None
    """Configuration (subset) of a Hub dataset that has several."""
    task: Task | None = None
    """Task of the rows. May be left out for the reference datasets, which are known by name."""
    columns: Columns = Columns()
    """Which column holds what."""
    splits: Splits = Splits()
    """Which of the dataset's own splits to use."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Examples an epoch as a multiple of the rows: 0.5 draws a fresh half each epoch, 2 shows each twice."""
    loss_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Factor on this dataset's share of the loss."""
    loss_on: Literal["all", "last"] = "all"
    """Chat: learn every assistant turn, or only the last."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use at most this many rows, drawn with the split's seed."""
    filter: Text | None = None
    """Jinja expression over the row's columns; rows where it is false are left out: `text | length > 20`."""
    group_by: ColumnName | None = None
    """Rows with the same value in this column stay on one side of the split."""
    system_prompt: Text | None = None
    """System message put before every prompt."""
    template: Text | None = None
    """Jinja template of the prompt over the row's columns, instead of the task's own."""
    answer_template: Text | None = None
    """Jinja template of the answer over the row's columns."""


class Split(ApiModel):
    """How rows are divided where the dataset has no split of its own."""

    validation: Fraction = 0.2
    """Share of the rows held out for validation."""
    test: Fraction = 0.0
    """Share of the rows held out for the final evaluation."""
    seed: int = 42
    """Seed of the split; the same seed gives the same split."""
    stratify: bool = True
    """Keep each label's share equal on all sides."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule("self.validation + self.test < 1.0", "validation and test together must leave rows to train on"),
    )


class Lora(ApiModel):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is multiplied by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input."""
    target_modules: Annotated[str, StringConstraints(min_length=1, max_length=2000)] = "all-linear"
    """`all-linear`, names separated by commas (`q_proj,v_proj`), or a regular expression of whole module names."""
    layers: Annotated[str, StringConstraints(pattern=r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$")] | None = None
    """Layers that get adapters, such as `12-29` or `0,4,8`. No backward pass runs below the lowest one."""
    modules_to_save: list[str] = []
    """Modules trained whole and saved with the adapter, such as `lm_head`."""
    dora: bool = False
    """Weight-decomposed adapters (https://arxiv.org/abs/2402.09353)."""
    rslora: bool = False
    """Rank-stabilised scale (https://arxiv.org/abs/2312.03732)."""
    init: Literal["default", "gaussian", "pissa"] = "default"
    """How A and B start: Kaiming and zero, Gaussian and zero, or the principal singular vectors (PiSSA)."""
    b_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: learning rate of B as a multiple of A's (https://arxiv.org/abs/2402.12354)."""


class PromptTuning(ApiModel):
    """Soft prompt (https://arxiv.org/abs/2104.08691)."""

    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Trained embeddings put before the input."""
    init_text: Text | None = None
    """Text whose token embeddings the prompt starts from; random when left out."""


class PrefixTuning(ApiModel):
    """Trained keys and values before every layer (https://arxiv.org/abs/2101.00190)."""

    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Trained positions a layer."""


class Quantization(ApiModel):
    """How QLoRA stores the frozen base (https://arxiv.org/abs/2305.14314)."""

    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: bool = True
    """Quantise the quantisation constants too."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the products. `auto` takes bfloat16 where the device computes it fast."""


class Tuning(ApiModel):
    """What is trained."""

    method: Method
    """`full`, `lora`, `qlora` (LoRA on a 4-bit base), `prompt` or `prefix`."""
    lora: Lora = Lora()
    """Used by `lora` and `qlora`."""
    prompt: PromptTuning = PromptTuning()
    """Used by `prompt`."""
    prefix: PrefixTuning = PrefixTuning()
    """Used by `prefix`."""
    quantization: Quantization = Quantization()
    """Used by `qlora`."""


class Scheduler(ApiModel):
    """Learning rate over the steps."""

    type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` holds, then decays over the last fifth."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the rate rises linearly from 0."""


class EarlyStopping(ApiModel):
    """Stop when validation no longer improves."""

    metric: Literal["loss", "accuracy"] = "loss"
    """Validation metric that is watched."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Validations in a row without improvement after which training stops."""


class ResumeFrom(ApiModel):
    """Checkpoint of another job to start from."""

    claim: Name | None = None
    """PersistentVolumeClaim that holds it; the job's own run volume when left out."""
    path: Path
    """Directory of the checkpoint (`.../checkpoints/step-00000100`) on that volume; locally a path."""


class Training(ApiModel):
    """How it is trained."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 2
    """Passes over the mixture."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimiser steps; the schedule is stretched over them."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak learning rate. Left out: by the method (2e-4 LoRA, 1e-5 full, 1e-2 prompt, 5e-3 prefix)."""
    scheduler: Scheduler = Scheduler()
    """Learning rate over the steps."""
    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples (documents) an optimiser step, over all ranks and micro-batches."""
    max_sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens in one document at most."""
    seed: int = 42
    """Seed of order, initialisation and dropout."""
    optimizer: Literal["adamw"] = "adamw"
    """Optimiser; fused on GPUs."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; never on norms, biases and embeddings."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's decay rates of the two moments."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Global gradient norm above which gradients are scaled down."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end as a share of the peak."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the input embeddings (https://arxiv.org/abs/2310.05914); 0 is off."""
    label_smoothing: Fraction = 0.0
    """Share of the probability spread over the whole vocabulary."""
    loss_reduction: Literal["auto", "token", "example"] = "auto"
    """Mean over tokens, or over each example's tokens and then examples. `auto`: `example` for several tasks."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of the products. `auto`: bf16 where the device has instructions for it."""
    packing: bool | None = None
    """Several documents in one row without attention between them. Left out: on, but for prompt and prefix."""
    compile: bool | None = None
    """torch.compile, layer by layer. Left out: on for CUDA, off for CPU, where it does not pay."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass. Left out: on only where the memory plan needs it."""
    deterministic: bool = False
    """Deterministic kernels: bit-for-bit the same on GPUs too, somewhat slower."""
    validate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between validations. Left out: four times an epoch."""
    validation_rows: Annotated[int, Field(ge=1)] = 512
    """Validation examples used during training at most."""
    early_stopping: EarlyStopping | None = None
    """Stop when validation no longer improves."""
    keep_best: bool = True
    """Export the checkpoint with the best validation loss instead of the last one."""
    resume_from: ResumeFrom | None = None
    """Start from the weights and optimiser state of another job's checkpoint."""


class Topology(ApiModel):
    """Where it is trained."""

    nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Pods that train together."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs (and processes) a pod; 0 trains on the CPU, one process a pod. Left out: 1, locally what is there."""
    gpu_type: Annotated[str, StringConstraints(max_length=63)] | None = None
    """GPU such as `A100-80GB`, for the memory plan, the time and the price."""
    sharding: Literal["full", "hybrid"] = "full"
    """`full` shards over all ranks, `hybrid` within a node and replicates over nodes."""


class Checkpoint(ApiModel):
    """When state is saved."""

    every_minutes: Annotated[float, Field(ge=0)] = 10
    """Minutes between checkpoints; 0 saves after every step."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints kept, beside the best one."""


class CacheVolume(ApiModel):
    """The claim that holds downloads, shared between jobs."""

    claim_name: Name = "finetune-cache"
    """PersistentVolumeClaim; mounted read-only outside Prepare."""


class RunVolume(ApiModel):
    """The volume of the job: prepared data, checkpoints, export."""

    claim_name: Name | None = None
    """An existing claim. Left out: one is made with the fields below."""
    size: Quantity = "100Gi"
    """Size of the claim that is made."""
    storage_class_name: str | None = None
    """Storage class of the claim that is made; the cluster's default when left out."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] | None = None
    """Left out: ReadWriteMany for several nodes, ReadWriteOnce for one."""
    keep: bool = True
    """Keep the claim when the job is deleted."""


class Storage(ApiModel):
    """Persistent volumes; not used by `finetune run`."""

    cache: CacheVolume = CacheVolume()
    """Downloads, shared between jobs."""
    run: RunVolume = RunVolume()
    """The job's own data."""


class Gate(ApiModel):
    """What must hold before anything is published."""

    must_improve: bool = True
    """The macro-mean's paired 95% lower bound is above 0 and no dataset is significantly worse."""
    minimum: dict[str, float] = {}
    """Least value for a metric: `{banking77/accuracy: 0.9}`."""


class Evaluation(ApiModel):
    """How the exported model is measured."""

    baseline: bool = True
    """Measure the untuned model too, on the same rows and prompts."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    """Examples from train shown in a further baseline's prompt."""
    gate: Gate = Gate()
    """What must hold before anything is published."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows a dataset that are evaluated, drawn with the split's seed. Left out: all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens generated for a free answer at most."""
    prompts: list[Text] = []
    """Prompts answered by base and tuned model side by side in the report."""
    metrics: list[Literal["accuracy", "macro-f1", "exact-match", "f1", "rouge", "bleu", "perplexity"]] = []
    """Further metrics beside each task's own."""


class Publish(ApiModel):
    """Where the result goes."""

    repo: RepoId | None = None
    """Hub repository to upload to; made if it does not exist."""
    path: Path | None = None
    """Directory instead of `repo`; on a cluster relative to the run volume, locally to the job's file."""
    private: bool = True
    """The repository must be private; an existing public one is refused."""
    format: Literal["adapter", "merged"] = "adapter"
    """Upload the adapter, or the base model with the adapter merged in. Full tuning always uploads the model."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (ONE_SOURCE,)


class Wandb(ApiModel):
    """Weights & Biases."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    """Project that the run is logged to."""
    entity: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Team or user; the key's default when left out."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes the run beside the logs, to be synced later."""


class Tracking(ApiModel):
    """Experiment trackers; a broken tracker never stops a training."""

    wandb: Wandb | None = None
    """Weights & Biases."""


class SecretKey(ApiModel):
    """One key of a Secret in the job's namespace."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
    """Name of the Secret."""
    key: Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)] = "token"
    """Key in the Secret."""


class Credentials(ApiModel):
    """Tokens, each mounted as a file in one stage alone. Locally HF_TOKEN, HF_PUBLISH_TOKEN and WANDB_API_KEY."""

    hub: SecretKey | None = None
    """Hub read token; only Prepare sees it."""
    publish: SecretKey | None = None
    """Hub write token; seen only by Publish and by the check of write access before Prepare. Falls back to `hub`."""
    wandb: SecretKey | None = None
    """W&B key; only Train sees it."""


class Retry(ApiModel):
    """How often failures are tried again."""

    limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Counted failures (crash, hang, out of memory) a stage may have; preemption and node loss are not counted."""


class Timeouts(ApiModel):
    """When waiting ends."""

    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """Seconds of running time over all attempts; waiting in a queue is not counted."""
    startup: Duration = "15m"
    """Time for all pods to run and meet, counted from the first that runs."""
    hang: Duration = "20m"
    """Time without a step after which the ranks write their stacks and the attempt is retried."""


class Cleanup(ApiModel):
    """What is removed afterwards. The FineTuneJob itself never is."""

    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    """Seconds after the end at which the job's pods and other children are deleted."""


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    key: str | None = None
    """Taint key."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How key and value are compared."""
    value: str | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; all when left out."""
    toleration_seconds: int | None = None
    """Seconds that a NoExecute taint is tolerated."""


class EnvVar(ApiModel):
    """An environment variable given by value."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    """Name of the variable."""
    value: Annotated[str, StringConstraints(max_length=4096)]
    """Value; never a secret, which belongs in `credentials`."""


class Resources(ApiModel):
    """CPU, memory and other resources of a training pod; GPUs come from `topology`."""

    requests: dict[str, str] = {}
    """Requests, such as `{cpu: "8", memory: 64Gi}`."""
    limits: dict[str, str] = {}
    """Limits."""


class PodTemplate(ApiModel):
    """What may be said about the pods: an allow-list."""

    node_selector: dict[str, str] = {}
    """Labels a node must have."""
    tolerations: list[Toleration] = []
    """Taints that are tolerated."""
    priority_class_name: str = ""
    """PriorityClass of the pods."""
    queue_name: str = ""
    """Kueue LocalQueue of the stages that ask for GPUs."""
    labels: dict[str, str] = {}
    """Further labels on the pods."""
    annotations: dict[str, str] = {}
    """Further annotations on the pods."""
    env: list[EnvVar] = []
    """Further environment variables of the trainer."""
    resources: Resources = Resources()
    """CPU and memory of a training pod."""


class ImagePullSecret(ApiModel):
    """Reference to a Secret for pulling the image."""

    name: str
    """Name of the Secret."""


class FineTuneJobSpec(ApiModel):
    """What a user asks for."""

    model: Model
    """The base model."""
    datasets: Annotated[list[Dataset], Field(min_length=1, max_length=64)]
    """Datasets trained together."""
    split: Split = Split()
    """How rows are divided where a dataset has no split of its own."""
    tuning: Tuning
    """What is trained."""
    training: Training = Training()
    """How it is trained."""
    topology: Topology = Topology()
    """Where it is trained."""
    checkpoint: Checkpoint = Checkpoint()
    """When state is saved."""
    storage: Storage = Storage()
    """Persistent volumes."""
    evaluation: Evaluation = Evaluation()
    """How the exported model is measured."""
    publish: Publish | None = None
    """Where the result goes; left out, it stays on the run volume."""
    tracking: Tracking = Tracking()
    """Experiment trackers."""
    credentials: Credentials = Credentials()
    """Tokens."""
    retry: Retry = Retry()
    """How often failures are tried again."""
    timeouts: Timeouts = Timeouts()
    """When waiting ends."""
    cleanup: Cleanup = Cleanup()
    """What is removed afterwards."""
    suspend: bool = False
    """Stop after a checkpoint and give the GPUs back; set to false to go on."""
    pod_template: PodTemplate = PodTemplate()
    """What may be said about the pods."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=500)] | None = None
    """Trainer image; the operator's own default when left out."""
    image_pull_secrets: list[ImagePullSecret] = []
    """Secrets for pulling the image."""


class ObjectMeta(ApiModel):
    """The parts of Kubernetes metadata that are read here; others are kept as they are."""

    model_config = ApiModel.model_config | {"extra": "allow"}

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}


class FineTuneJob(ApiModel):
    """A fine-tuning job: base model and datasets in, evaluated and published model out."""

    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: ObjectMeta
    spec: FineTuneJobSpec
    status: dict[str, Any] | None = None
