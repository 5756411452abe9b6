"""The `spec` of a FineTuneJob: what a user asks for. Only model, datasets and tuning.method are required.

The CRD, the reference page and the run config are made from these models. A field that may be left out
to let the trainer choose says so in its description; what was chosen, and why, is in the report.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema

from finetune_api.base import ApiModel, Duration, Fraction, Name, Quantity, RepoId, Rule
from finetune_api.known_datasets import KNOWN_DATASETS
from finetune_api.traits import Method, Task

Path = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Text = Annotated[str, StringConstraints(max_length=20_000)]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
SplitName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
SecretName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
KubernetesName = Annotated[str, StringConstraints(max_length=253)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]
Labels = Annotated[dict[str, LabelValue], Field(max_length=64)]
ResourceAmount = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$", max_length=32),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "maxLength": 32,
            "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$",
        }
    ),
]
"""An amount of CPU, memory or another resource: `8`, `500m`, `64Gi`."""
Resource = Annotated[dict[str, ResourceAmount], Field(max_length=32)]


ONE_SOURCE = Rule(
    "has(self.repo) != has(self.path)",
    "give exactly one of repo (a Hub repository) and path (a file or directory)",
)
REVISION_NEEDS_REPO = Rule(
    "has(self.repo) || self.revision == 'main'",
    "revision is a branch, tag or commit on the Hub and has no effect beside path: take it out",
    ".revision",
)


def _literal(value: object) -> str:
    """A Python value as CEL."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(str(value)) if isinstance(value, str) else repr(value)


def _as_by_default(prefix: str, model: type[ApiModel], *, but: str = "") -> str:
    """CEL that holds while every field of the object at `prefix`, except `but`, has its default: nothing was asked."""
    terms = []
    for name, field in model.model_fields.items():
        if name == but:
            continue
        path = f"{prefix}.{field.alias or name}"
        default = getattr(model(), name)
        if default is None:
            terms.append(f"!has({path})")
        elif isinstance(default, list):
            terms.append(f"size({path}) == {len(default)}")
        else:
            terms.append(f"{path} == {_literal(default)}")
    return " && ".join(terms)


def _reads_only(task: Task) -> Rule:
    """Refuse columns that rows of this task do not have."""
    foreign = [name for name in Columns.model_fields if name not in task.traits.columns]
    given = " || ".join(f"has(self.columns.{name})" for name in foreign)
    return Rule(
        f"!has(self.task) || self.task != '{task}' || !({given})",
        f"task {task} reads no other columns than {', '.join(task.traits.columns)}: take the others out, "
        "or choose the task that they belong to",
        ".columns",
    )


def _no_effect(name: str, task: Task) -> Rule:
    return Rule(
        f"!has(self.{name}) || !has(self.task) || self.task != '{task}'",
        f"{name} has no effect on task {task}: take it out",
        f".{name}",
    )


class Source(ApiModel):
    """Where a model, adapter or dataset comes from."""

    repo: RepoId | None = None
    """Repository on the Hub, as `owner/name`."""
    revision: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "main"
    """Branch, tag or commit of `repo`. Prepare resolves it to a commit once; every attempt uses that commit."""
    path: Path | None = None
    """File or directory instead of `repo`; on a cluster relative to the cache volume, locally to the job's file."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (ONE_SOURCE, REVISION_NEEDS_REPO)


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

    train: SplitName = "train"
    """Split to train on."""
    validation: SplitName | None = None
    """Split for validation, instead of a share cut from train."""
    test: SplitName | None = None
    """Held-out split for the final evaluation."""


class Dataset(Source):
    """One dataset of the mixture."""

    name: Name
    """Short unique name; metrics are called `<name>/<metric>`."""
    config: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """Configuration (subset) of a dataset that has several: one of its README, or a folder."""
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

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        ONE_SOURCE,
        REVISION_NEEDS_REPO,
        Rule(
            f"has(self.task) || (has(self.repo) && self.repo in {sorted(KNOWN_DATASETS)})",
            f"say with task what the rows teach ({', '.join(Task)}); it may be left out only for "
            f"{', '.join(sorted(KNOWN_DATASETS))}",
            ".task",
            "FieldValueRequired",
        ),
        *(_reads_only(task) for task in Task),
        *(
            _no_effect(name, task)
            for name in ("template", "answerTemplate", "systemPrompt")
            for task in Task
            if name in task.traits.without_effect
        ),
        Rule(
            "self.lossOn == 'all' || (has(self.task) && self.task == 'chat')",
            "lossOn: last chooses among the turns of a chat and has no effect on other tasks: take it out",
            ".lossOn",
        ),
    )


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
    layers: (
        Annotated[str, StringConstraints(pattern=r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$", max_length=1000)] | None
    ) = None
    """Layers that get adapters, such as `12-29` or `0,4,8`. No backward pass runs below the lowest one."""
    modules_to_save: Annotated[list[ModuleName], Field(max_length=64)] = []
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


_LAYERS_IN_4_BITS = r"(^|[.])(q|k|v|o|gate|up|down)_proj$"
"""Linear layers whatever the architecture that calls a module so; which other names are one, the model decides."""


def _used_only_by_its_methods(block: str, model: type[ApiModel]) -> Rule:
    """Refuse settings of a method that is not chosen."""
    methods = [str(method) for method in Method if block in method.traits.blocks]
    one = len(methods) == 1
    return Rule(
        f"self.method {f'== {methods[0]!r}' if one else f'in {methods}'} || ({_as_by_default(f'self.{block}', model)})",
        f"{block} is used by the method{'' if one else 's'} {' and '.join(methods)} only: "
        f"choose {'it' if one else 'one of them'}, or take {block} out",
        f".{block}",
    )


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

    @property
    def virtual_tokens(self) -> int:
        """Trained positions before each input, which take room in the model's context."""
        traits = self.method.traits
        count: int = getattr(self, traits.blocks[0]).virtual_tokens if traits.prepends_tokens else 0
        return count

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        _used_only_by_its_methods("lora", Lora),
        _used_only_by_its_methods("prompt", PromptTuning),
        _used_only_by_its_methods("prefix", PrefixTuning),
        _used_only_by_its_methods("quantization", Quantization),
        Rule(
            "self.method != 'qlora' || self.lora.init != 'pissa'",
            "pissa starts from the singular vectors of the weights, which qlora holds in 4 bits only: "
            "choose the method lora, or another init",
            ".lora.init",
        ),
        Rule(
            f"self.method != 'qlora' || !self.lora.modulesToSave.exists(m, m.matches('{_LAYERS_IN_4_BITS}'))",
            "attention and feed-forward layers are stored in 4 bits by qlora and cannot be trained whole: "
            "take them out of modulesToSave, or choose the method lora",
            ".lora.modulesToSave",
        ),
    )


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

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.claim) || !self.path.startsWith('/')",
            "path is looked for on the claim, and one that begins with / leads beside it: "
            "write <namespace>/<job>/<uid>/checkpoints/step-… as it lies on the volume",
            ".path",
        ),
    )


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
    shared_prefixes: bool | None = None
    """Compute once what several examples of a step begin with, such as an instruction with all labels: the losses and
    gradients are the same. Left out: on where that is exact, so not with dropout, noise or padded rows."""
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

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.scheduler.type != 'constant' || self.minLearningRateRatio == 0.0",
            "the constant schedule never falls, so minLearningRateRatio has no effect: take it out, "
            "or choose cosine, linear or wsd",
            ".minLearningRateRatio",
        ),
    )


class Topology(ApiModel):
    """Where it is trained."""

    nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Pods that train together."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs (and processes) a pod; 0 trains on the CPU, one process a pod. Left out: 1, locally what is there."""
    gpu_type: Annotated[str, StringConstraints(max_length=63)] | None = None
    """GPU such as `A100-80GB`, for the memory plan, time and price; nodes are chosen by `podTemplate`."""
    sharding: Literal["full", "hybrid"] = "full"
    """`full` shards over all ranks, `hybrid` within a node and replicates over nodes."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.gpuType) || !has(self.gpusPerNode) || self.gpusPerNode > 0",
            "gpusPerNode: 0 trains on the CPU, so gpuType has no effect: take one of them out",
            ".gpuType",
        ),
    )


class Checkpoint(ApiModel):
    """When state is saved."""

    every_minutes: Annotated[float, Field(ge=0)] = 10
    """Minutes between checkpoints; 0 saves after every step."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints kept, beside the best one."""


class CacheVolume(ApiModel):
    """The claim that holds downloads, shared between jobs."""

    claim_name: Name = "finetune-cache"
    """PersistentVolumeClaim in the job's namespace, made by you; mounted read-only outside Prepare."""


class RunVolume(ApiModel):
    """The volume of the job: prepared data, checkpoints, export."""

    claim_name: Name | None = None
    """An existing claim. Left out: one is made with the fields below."""
    size: Quantity = "100Gi"
    """Size of the claim that is made, such as `200Gi`."""
    storage_class_name: KubernetesName | None = None
    """Storage class of the claim that is made; the cluster's default when left out."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] | None = None
    """Left out: ReadWriteMany for several nodes, ReadWriteOnce for one."""
    keep: bool = True
    """Keep the claim when the job is deleted."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.claimName) || (self.size == '100Gi' && !has(self.storageClassName) && !has(self.accessMode))",
            "size, storageClassName and accessMode are for a claim that is made and have no effect on the existing "
            "one: take them out, or take claimName out",
            ".claimName",
        ),
        Rule(
            "!has(self.claimName) || self.keep",
            "an existing claim is never deleted: take keep: false out, or take claimName out",
            ".keep",
        ),
    )


class Storage(ApiModel):
    """Persistent volumes; not used by `finetune run`."""

    cache: CacheVolume = CacheVolume()
    """Downloads, shared between jobs."""
    run: RunVolume = RunVolume()
    """The job's own data."""


class Gate(ApiModel):
    """What must hold before anything is published."""

    must_improve: bool = True
    """Better than the untuned model: the difference's 95% interval is above 0 in the mean, below 0 for no dataset."""
    minimum: Annotated[dict[str, float], Field(max_length=64)] = {}
    """Least value of a metric of the tuned model: `{banking77/accuracy: 0.9}`."""


class Evaluation(ApiModel):
    """How the exported model is measured."""

    baseline: bool = True
    """Measure the untuned model too, on the same rows and prompts."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    """Examples from train shown in a further baseline's prompt."""
    gate: Gate = Gate()
    """What must hold before anything is published."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Evaluate at most so many held-out rows of each dataset, drawn with the split's seed. Left out: all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens of a generated answer at most (question answering, summaries, `prompts`)."""
    prompts: Annotated[list[Text], Field(max_length=64)] = []
    """Prompts answered by base and tuned model side by side in the report."""
    metrics: Annotated[
        list[Literal["accuracy", "macro-f1", "exact-match", "f1", "rouge", "bleu", "perplexity"]], Field(max_length=16)
    ] = []
    """Further metrics beside each task's own (accuracy; F1; ROUGE-L; loss), where they can be computed for the task."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.baseline || !self.gate.mustImprove",
            "mustImprove compares with the untuned model, which baseline: false does not measure: "
            "take baseline out, or set mustImprove: false",
            ".gate.mustImprove",
        ),
        Rule(
            "self.baseline || self.fewShot == 0",
            "fewShot shows examples to the untuned model, which baseline: false does not measure: "
            "take baseline out, or fewShot",
            ".fewShot",
        ),
    )


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

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        ONE_SOURCE,
        Rule(
            "has(self.repo) || self.private",
            "private is about a Hub repository and has no effect beside path: take it out",
            ".private",
        ),
    )


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

    name: SecretName
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
    """Seconds of running time over all attempts; waiting in a queue is not counted. Left out: no limit."""
    startup: Duration = "15m"
    """Time for all pods to run and meet, counted from the first that runs."""
    hang: Duration = "20m"
    """Time without a step after which the ranks write their stacks and the attempt is retried."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "duration(self.startup) >= duration('1m')",
            "pods need a minute at least to start and meet: write 1m or more",
            ".startup",
        ),
        Rule(
            "duration(self.hang) >= duration('1m')",
            "below a minute a slow step would pass for a hang: write 1m or more",
            ".hang",
        ),
    )


class Cleanup(ApiModel):
    """What is removed afterwards. The FineTuneJob itself never is."""

    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    """Seconds after the end at which the job's pods and other children are deleted. Left out: they stay."""


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    key: KubernetesName | None = None
    """Taint key."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How key and value are compared."""
    value: LabelValue | None = None
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
    """CPU, memory and other resources of each pod of Train and Evaluate; GPUs come from `topology`."""

    requests: Resource = {}
    """Requests, such as `{cpu: 8, memory: 64Gi}`."""
    limits: Resource = {}
    """Limits."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(
                f"!('nvidia.com/gpu' in self.{kind})",
                "GPUs come from topology.gpusPerNode: take nvidia.com/gpu out",
                f".{kind}",
            )
            for kind in ("requests", "limits")
        ),
    )


RESERVED_PREFIXES = ("app.kubernetes.io/", "finetune.dev/", "training.kubeflow.org/", "kueue.x-k8s.io/")
"""Labels and annotations that the operator and the controllers it works with write themselves."""


def _no_reserved(kind: str) -> Rule:
    own = " || ".join(f"k.startsWith('{prefix}')" for prefix in RESERVED_PREFIXES)
    return Rule(
        f"!self.{kind}.exists(k, {own})",
        f"{', '.join(RESERVED_PREFIXES)} belong to the operator and to the controllers it works with: "
        "use a prefix of your own (a Kueue queue is set with queueName)",
        f".{kind}",
    )


class PodTemplate(ApiModel):
    """What may be said about the pods of all stages, unless a field names some: an allow-list."""

    node_selector: Labels = {}
    """Labels a node must have for Train and Evaluate, and for Prepare where it binds a new claim."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that are tolerated where `nodeSelector` holds; also the GPU nodes' own, unless the cluster adds it."""
    priority_class_name: KubernetesName = ""
    """PriorityClass of the pods."""
    queue_name: LabelValue = ""
    """Kueue LocalQueue, in the job's namespace, of Train and Evaluate where they ask for GPUs."""
    labels: Labels = {}
    """Further labels on the pods."""
    annotations: Annotated[dict[str, Annotated[str, StringConstraints(max_length=4096)]], Field(max_length=64)] = {}
    """Further annotations on the pods."""
    env: Annotated[list[EnvVar], Field(max_length=128)] = []
    """Further environment variables of the trainer, in all stages."""
    resources: Resources = Resources()
    """CPU, memory and other resources of each pod of Train and Evaluate."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        _no_reserved("labels"),
        _no_reserved("annotations"),
        Rule(
            "!self.env.exists(e, e.name.matches("
            "'^(FINETUNE_.*|PET_.*|TORCHELASTIC_.*|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT))$'))",
            "FINETUNE_*, PET_*, TORCHELASTIC_*, RANK, WORLD_SIZE, LOCAL_* and MASTER_* tell the ranks who they are "
            "and are set by the operator: take them out",
            ".env",
        ),
        Rule(
            "!self.env.exists(e, e.name in "
            "['HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_PUBLISH_TOKEN', 'WANDB_API_KEY'])",
            "a token in env is readable by everyone who may read the job: put it into a Secret and name that "
            "in spec.credentials",
            ".env",
        ),
    )


class ImagePullSecret(ApiModel):
    """Reference to a Secret for pulling the image."""

    name: SecretName
    """Name of the Secret."""


class Mutability(StrEnum):
    """When a field of the spec may change."""

    ALWAYS = "always"
    SUSPENDED = "while suspended"
    NEVER = "never"


MUTABILITY: dict[str, Mutability] = {
    "model": Mutability.NEVER,
    "datasets": Mutability.NEVER,
    "split": Mutability.NEVER,
    "tuning": Mutability.NEVER,
    "training": Mutability.NEVER,
    "topology": Mutability.SUSPENDED,
    "checkpoint": Mutability.NEVER,
    "storage": Mutability.NEVER,
    "evaluation": Mutability.NEVER,
    "publish": Mutability.NEVER,
    "tracking": Mutability.NEVER,
    "credentials": Mutability.ALWAYS,
    "retry": Mutability.ALWAYS,
    "timeouts": Mutability.ALWAYS,
    "cleanup": Mutability.ALWAYS,
    "suspend": Mutability.ALWAYS,
    "podTemplate": Mutability.SUSPENDED,
    "image": Mutability.NEVER,
    "imagePullSecrets": Mutability.NEVER,
}
"""When each field of the spec may change: what a finished or running job is made of stays as it was applied."""

OPTIONAL_FIELDS = ("publish", "image")
"""Fields of the spec without a default: they may be absent before and after a change."""


def _mutability_rules() -> tuple[Rule, ...]:
    rules = []
    for name, mutability in MUTABILITY.items():
        same = f"self.{name} == oldSelf.{name}"
        if name in OPTIONAL_FIELDS:
            same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
        if mutability is Mutability.NEVER:
            sentence = f"{name} cannot change once the job exists: apply the change under a new metadata.name"
            rules.append(Rule(same, sentence, f".{name}", "FieldValueForbidden"))
        elif mutability is Mutability.SUSPENDED:
            sentence = f"{name} can change only while the job is suspended: set suspend: true first"
            rules.append(Rule(f"oldSelf.suspend || {same}", sentence, f".{name}", "FieldValueForbidden"))
    return tuple(rules)


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
    """Trainer image, best with a digest; the operator's own default when left out."""
    image_pull_secrets: Annotated[list[ImagePullSecret], Field(max_length=16)] = []
    """Secrets for pulling the image."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        *_mutability_rules(),
        Rule(
            "self.datasets.all(d, self.datasets.exists_one(other, other.name == d.name))",
            "two datasets have the same name, and metrics are called by it: give each a name of its own",
            ".datasets",
        ),
        Rule(
            "!has(self.model.adapter) || self.tuning.method in ['lora', 'qlora']",
            "adapter is a LoRA to go on training: choose the method lora or qlora, or take adapter out",
            ".model.adapter",
        ),
        Rule(
            f"!has(self.model.adapter) || ({_as_by_default('self.tuning.lora', Lora, but='b_plus_ratio')})",
            "an adapter that is trained on keeps its own shape, so of tuning.lora only bPlusRatio has an effect: "
            "take the others out",
            ".tuning.lora",
        ),
        Rule(
            "!has(self.model.adapter) || !has(self.training.resumeFrom)",
            "adapter and training.resumeFrom are two starting points: give one of them",
            ".training.resumeFrom",
        ),
        Rule(
            "!(self.tuning.method in ['prompt', 'prefix']) || !has(self.training.packing) || !self.training.packing",
            "prompt and prefix put their tokens once before a row, so packed documents would see each other's: "
            "take packing out",
            ".training.packing",
        ),
        Rule(
            "!has(self.training.sharedPrefixes) || !self.training.sharedPrefixes "
            "|| self.tuning.lora.dropout == 0.0 && self.training.neftuneAlpha == 0.0 "
            "&& !(self.tuning.method in ['prompt', 'prefix']) "
            "&& (!has(self.training.packing) || self.training.packing)",
            "a prefix can be computed once only if nothing is drawn for its tokens and documents share rows: "
            "take sharedPrefixes out, or lora.dropout, neftuneAlpha and packing: false",
            ".training.sharedPrefixes",
        ),
        Rule(
            "self.tuning.method != 'prefix' || !has(self.training.activationCheckpointing) "
            "|| !self.training.activationCheckpointing",
            "prefix hands its keys and values over in a cache, which activation checkpointing cannot recompute: "
            "take activationCheckpointing out",
            ".training.activationCheckpointing",
        ),
        Rule(
            "!(self.tuning.method in ['prompt', 'prefix']) || !has(self.publish) || self.publish.format != 'merged'",
            "prompt and prefix are not part of the weights and cannot be merged into them: choose format: adapter",
            ".publish.format",
        ),
        Rule(
            "!(self.model.attention in ['flash', 'flex', 'varlen']) || !has(self.topology.gpusPerNode) "
            "|| self.topology.gpusPerNode > 0",
            "flash, flex and varlen attention train on GPUs only and gpusPerNode is 0: choose auto, sdpa or eager",
            ".model.attention",
        ),
        Rule(
            "!(self.model.attention in ['flash', 'varlen']) || self.training.precision != 'fp32'",
            "flash and varlen attention compute in 16 bits only: choose another attention, or another precision",
            ".model.attention",
        ),
        Rule(
            "self.model.attention != 'varlen' || !(self.tuning.method in ['prompt', 'prefix']) "
            "&& (!has(self.training.packing) || self.training.packing)",
            "varlen attention is for packed rows, which prompt, prefix and packing: false do without: "
            "choose auto, or take packing out",
            ".model.attention",
        ),
        Rule(
            "self.topology.nodes == 1 || !has(self.storage.run.accessMode) "
            "|| self.storage.run.accessMode != 'ReadWriteOnce'",
            "several nodes write to the run volume at once: choose ReadWriteMany, or nodes: 1",
            ".storage.run.accessMode",
        ),
        Rule(
            "!self.evaluation.gate.mustImprove && size(self.evaluation.gate.minimum) == 0 "
            "|| self.split.validation + self.split.test > 0.0 "
            "|| self.datasets.all(d, has(d.splits.validation) || has(d.splits.test))",
            "nothing is held out that the gate could measure on: set split.validation or split.test above 0, "
            "or name a validation or test split of each dataset",
            ".split",
        ),
        Rule(
            "!has(self.training.earlyStopping) || self.split.validation > 0.0 "
            "|| self.datasets.exists(d, has(d.splits.validation))",
            "early stopping watches validation and there is none: set split.validation above 0, "
            "or name a dataset's validation split",
            ".training.earlyStopping",
        ),
        Rule(
            "self.evaluation.gate.minimum.all(key, key.startsWith('macro/') "
            "|| self.datasets.exists(d, key.startsWith(d.name + '/')))",
            "a minimum is called <dataset>/<metric>, such as banking77/accuracy, with a dataset of this job, "
            "or macro/<metric>",
            ".evaluation.gate.minimum",
        ),
    )


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

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 63",
            "a job's name is part of host names: at most 63 lower-case letters, digits and '-', "
            "beginning and ending with a letter or digit",
            ".metadata.name",
        ),
    )
