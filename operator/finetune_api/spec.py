"""The `spec` of a FineTuneJob: what a user asks for. Only model, datasets and tuning.method are required.

The CRD, the reference page and the run config are generated from these models. If leaving out a field lets the
trainer choose, the description says so; the report has what was chosen, and why.
"""

from __future__ import annotations

from enum import StrEnum
from math import ceil, floor
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

from finetune_api.base import ApiModel, Duration, Fraction, Name, Quantity, RepoId, Rule
from finetune_api.known_datasets import KNOWN_DATASETS
from finetune_api.patterns import check_module_pattern
from finetune_api.traits import Method, Task

Path = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Text = Annotated[str, StringConstraints(max_length=20_000)]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
SplitName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
SecretName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
Namespace = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
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
    "has(self.repo) != has(self.path)", "set exactly one of repo (a Hub repository) and path (a file or directory)"
)
REVISION_NEEDS_REPO = Rule(
    "has(self.repo) || self.revision == 'main'",
    "revision is a branch, tag or commit on the Hub and has no effect with path: remove it",
    ".revision",
)


def _literal(value: object) -> str:
    """A Python value as CEL."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(str(value)) if isinstance(value, str) else repr(value)


def _as_by_default(prefix: str, model: type[ApiModel], *, but: str = "") -> str:
    """CEL that holds while every field of the object at `prefix`, except `but`, has its default value."""
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
        f"task {task} reads only the columns {', '.join(task.traits.columns)}: remove the others, "
        "or choose the task that they belong to",
        ".columns",
    )


def _no_effect(name: str, task: Task) -> Rule:
    return Rule(
        f"!has(self.{name}) || !has(self.task) || self.task != '{task}'",
        f"{name} has no effect on task {task}: remove it",
        f".{name}",
    )


class Source(ApiModel):
    """Source of a model, adapter or dataset."""

    repo: RepoId | None = None
    """Hub repository, as `owner/name`."""
    revision: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "main"
    """Branch, tag or commit of `repo`. Prepare resolves it to a commit once, and all attempts use that commit."""
    path: Path | None = None
    """File or directory, instead of `repo`. Relative to the cache volume on a cluster, to the job file locally."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (ONE_SOURCE, REVISION_NEEDS_REPO)


class Adapter(Source):
    """A LoRA adapter to continue training from."""


class Model(Source):
    """The base model."""

    adapter: Adapter | None = None
    """Continue training this LoRA adapter instead of starting a new one."""
    attention: Literal["auto", "sdpa", "flex", "flash", "varlen", "eager"] = "auto"
    """Attention kernel. `auto` selects the fastest one on the device that keeps packed documents apart."""
    chat_template: Text | None = None
    """Jinja chat template that replaces the tokenizer's own in training, evaluation and the export."""
    trust_remote_code: bool = False
    """Run Python code from the model repository. Enable it only after reading that code."""


class Columns(ApiModel):
    """Column names of the data. If a column is not set, its usual names are tried."""

    text: ColumnName | None = None
    """Text to classify, or the document for task `text`."""
    label: ColumnName | None = None
    """Label for classification: a name, or an integer with names in the dataset's features."""
    question: ColumnName | None = None
    """Question, for multiple choice and question answering."""
    choices: ColumnName | None = None
    """List of choices, or CommonsenseQA's `{label: [...], text: [...]}`."""
    answer: ColumnName | None = None
    """Answer. Multiple choice: the choice's label, letter, text, or number from 0 or from 1, the same in all rows.
    Question answering: text, list of texts or SQuAD's `{text: [...]}`."""
    context: ColumnName | None = None
    """Passage that the question refers to."""
    prompt: ColumnName | None = None
    """Instruction to follow, for task `instruction`."""
    input: ColumnName | None = None
    """Input of the instruction, if it has one."""
    completion: ColumnName | None = None
    """Text that the model learns to write after the instruction."""
    messages: ColumnName | None = None
    """List of `{role, content}` turns."""
    tools: ColumnName | None = None
    """Functions that the answers of a chat may call: a list, or JSON."""
    system: ColumnName | None = None
    """System prompt of a chat or an instruction."""
    document: ColumnName | None = None
    """Text to summarise."""
    summary: ColumnName | None = None
    """Reference summary."""


class Splits(ApiModel):
    """The dataset's own splits to use. Splits that are not set are cut from `train`."""

    train: SplitName = "train"
    """Split to train on."""
    validation: SplitName | None = None
    """Split for validation, instead of a fraction of `train`."""
    test: SplitName | None = None
    """Held-out split for the final evaluation."""


class Dataset(Source):
    """One dataset of the mixture."""

    name: Name
    """Short, unique name. Metrics are named `<name>/<metric>`."""
    config: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """Configuration (subset) of a dataset with several: one from its README, or a folder."""
    task: Task | None = None
    """Task of the dataset. Can be left out for the datasets that are known by name."""
    columns: Columns = Columns()
    """Column names of the data."""
    splits: Splits = Splits()
    """The dataset's own splits to use."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Examples per epoch as a multiple of the rows: 0.5 draws a new half in each epoch, 2 uses each row twice."""
    loss_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Factor on this dataset's loss."""
    loss_on: Literal["all", "last"] = "all"
    """Chat: compute the loss on all assistant turns, or only on the last one."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of rows to use, drawn with the split's seed."""
    filter: Text | None = None
    """Jinja expression over the row's columns, such as `text | length > 20`. Rows for which it is false are skipped."""
    group_by: ColumnName | None = None
    """Rows with the same value in this column stay in the same split."""
    system_prompt: Text | None = None
    """System message added before every prompt."""
    template: Text | None = None
    """Jinja template of the prompt over the row's columns. Replaces the task's own template."""
    answer_template: Text | None = None
    """Jinja template of the answer over the row's columns."""
    special_tokens: Literal["text", "control"] = "text"
    """Task `text`: read special tokens such as `<|im_start|>` in the rows letter by letter (`text`), or as the
    tokenizer's special tokens (`control`), for rows that were rendered with a chat template or for filling in."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        ONE_SOURCE,
        REVISION_NEEDS_REPO,
        Rule(
            f"has(self.task) || (has(self.repo) && self.repo in {sorted(KNOWN_DATASETS)})",
            f"set task to one of {', '.join(Task)}; it can be left out only for {', '.join(sorted(KNOWN_DATASETS))}",
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
            "lossOn: last selects turns of a chat and has no effect on other tasks: remove it",
            ".lossOn",
        ),
        Rule(
            "self.specialTokens == 'text' || (has(self.task) && self.task == 'text')",
            "specialTokens: control has no effect on tasks other than text, whose rows cannot hold special tokens: "
            "remove it",
            ".specialTokens",
        ),
    )


USUAL_VALIDATION = 0.2
"""Fraction of the rows held out for validation unless the spec says otherwise."""


class Split(ApiModel):
    """How rows are split if the dataset has no splits of its own."""

    validation: Fraction | None = None
    """Fraction of the rows held out for validation. Default: 0.2. If these rows are also those of the final evaluation
    (`test` is 0), small datasets hold out more, up to 0.5, so that 30 rows can be measured."""
    test: Fraction = 0.0
    """Fraction of the rows held out for the final evaluation."""
    seed: int = 42
    """Random seed. The same seed gives the same split."""
    stratify: bool = True
    """Keep the proportion of each label equal in all splits."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"(has(self.validation) ? self.validation : {USUAL_VALIDATION}) + self.test < 1.0",
            f"validation ({USUAL_VALIDATION} if it is not set) and test must add up to less than 1",
        ),
    )


Layers = Annotated[
    str, StringConstraints(pattern=r"^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$", max_length=200)
]
"""Numbers and ranges of layers; four digits, so that no range is long to write out."""


class Lora(ApiModel):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is multiplied by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: Fraction = 0.0
    """Dropout probability on the adapters' input."""
    target_modules: Annotated[
        str, StringConstraints(min_length=1, max_length=2000), AfterValidator(check_module_pattern)
    ] = "all-linear"
    """`all-linear`, names separated by commas (`q_proj,v_proj`), or a regular expression for full module names."""
    layers: Layers | None = None
    """Layers with adapters, such as `12-29` or `0,4,8`. No backward pass is needed below the lowest one."""
    modules_to_save: Annotated[list[ModuleName], Field(max_length=64)] = []
    """Modules that are fully trained and saved with the adapter, such as `lm_head`."""
    dora: bool = False
    """Weight-decomposed adapters (https://arxiv.org/abs/2402.09353)."""
    rslora: bool = False
    """Rank-stabilised scale (https://arxiv.org/abs/2312.03732)."""
    init: Literal["default", "gaussian", "pissa"] = "default"
    """Initialisation of A and B: Kaiming and zero, Gaussian and zero, or the principal singular vectors (PiSSA)."""
    b_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: learning rate of B as a multiple of that of A (https://arxiv.org/abs/2402.12354)."""

    @property
    def layer_numbers(self) -> list[int] | None:
        """The layers that `layers` names: `12-14,20` is [12, 13, 14, 20]. None: all."""
        if self.layers is None:
            return None
        ends = [part.partition("-") for part in self.layers.split(",")]
        return sorted({number for first, _, last in ends for number in range(int(first), int(last or first) + 1)})


class PromptTuning(ApiModel):
    """Soft prompt (https://arxiv.org/abs/2104.08691)."""

    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Number of trained embeddings before the input."""
    init_text: Text | None = None
    """Text whose token embeddings initialise the prompt. If not set, the initialisation is random."""


class PrefixTuning(ApiModel):
    """Trained keys and values before every layer (https://arxiv.org/abs/2101.00190)."""

    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Number of trained positions per layer."""


class Quantization(ApiModel):
    """How QLoRA stores the frozen base (https://arxiv.org/abs/2305.14314)."""

    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: bool = True
    """Also quantise the quantisation constants."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of matrix products. `auto` selects bfloat16 if the device computes it fast."""


_LAYERS_IN_4_BITS = r"(^|[.])(q|k|v|o|gate|up|down)_proj$"
"""Names of linear layers in every architecture; the model knows its others."""


def _used_only_by_its_methods(block: str, model: type[ApiModel]) -> Rule:
    """Refuse settings of a method that is not chosen."""
    methods = [str(method) for method in Method if block in method.traits.blocks]
    one = len(methods) == 1
    return Rule(
        f"self.method {f'== {methods[0]!r}' if one else f'in {methods}'} || ({_as_by_default(f'self.{block}', model)})",
        f"{block} is used only by the method{'' if one else 's'} {' and '.join(methods)}: "
        f"choose {'it' if one else 'one of them'}, or remove {block}",
        f".{block}",
    )


class Tuning(ApiModel):
    """Tuning method and its settings."""

    method: Method
    """`full`, `lora`, `qlora` (LoRA on a 4-bit base), `prompt` or `prefix`."""
    lora: Lora = Lora()
    """Settings for `lora` and `qlora`."""
    prompt: PromptTuning = PromptTuning()
    """Settings for `prompt`."""
    prefix: PrefixTuning = PrefixTuning()
    """Settings for `prefix`."""
    quantization: Quantization = Quantization()
    """Settings for `qlora`."""

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
            "pissa needs the singular vectors of the weights, which qlora stores only in 4 bits: "
            "choose the method lora, or another init",
            ".lora.init",
        ),
        Rule(
            f"self.method != 'qlora' || !self.lora.modulesToSave.exists(m, m.matches('{_LAYERS_IN_4_BITS}'))",
            "qlora stores attention and feed-forward layers in 4 bits, so they cannot be fully trained: "
            "remove them from modulesToSave, or choose the method lora",
            ".lora.modulesToSave",
        ),
    )


class Scheduler(ApiModel):
    """Learning-rate schedule."""

    type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. `wsd` is constant, then decays over the last fifth of the steps."""
    warmup_ratio: Fraction = 0.03
    """Fraction of the steps in which the learning rate rises linearly from 0."""


class EarlyStopping(ApiModel):
    """Stop training when the validation metric no longer improves."""

    metric: Literal["loss", "accuracy"] = "loss"
    """Validation metric to watch."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Number of consecutive validations without improvement after which training stops."""


class ResumeFrom(ApiModel):
    """Checkpoint of another job to start from."""

    claim: Name | None = None
    """PersistentVolumeClaim that has the checkpoint. If not set, the job's own run volume."""
    path: Path
    """Directory of the checkpoint on that volume (`.../checkpoints/step-00000100`). Locally, a path."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.claim) || !self.path.startsWith('/')",
            "path must be relative to the claim and must not begin with /: "
            "write <namespace>/<job>/<uid>/checkpoints/step-…",
            ".path",
        ),
    )


class Training(ApiModel):
    """Training settings."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 2
    """Number of passes over the data."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this number of optimizer steps. The learning-rate schedule spans these steps."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak learning rate. Default by method: 2e-4 (lora, qlora), 1e-5 (full), 1e-2 (prompt), 5e-3 (prefix)."""
    scheduler: Scheduler = Scheduler()
    """Learning-rate schedule."""
    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimizer step, over all ranks and micro-batches."""
    max_sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Maximum number of tokens per example."""
    seed: int = 42
    """Random seed for the order of examples, initialisation and dropout."""
    optimizer: Literal["adamw"] = "adamw"
    """Optimizer. Fused on GPUs."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay. Not applied to norms, biases and embeddings."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's decay rates for the two moments."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Maximum global gradient norm. Larger gradients are scaled down."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate as a fraction of the peak."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """NEFTune: noise on the input embeddings (https://arxiv.org/abs/2310.05914). 0 disables it."""
    label_smoothing: Fraction = 0.0
    """Fraction of the probability that is spread over the whole vocabulary."""
    loss_reduction: Literal["auto", "token", "example"] = "auto"
    """`token`: mean over all tokens. `example`: mean over each example's tokens, then over examples. `auto`: `example`
    for datasets with several tasks, otherwise `token`."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of matrix products. `auto` selects bf16 if the device has instructions for it."""
    packing: bool | None = None
    """Pack several examples into one sequence, without attention between them. Default: on, except for `prompt` and
    `prefix` and for architectures whose packed examples would see each other, such as Falcon and gpt-oss."""
    shared_prefixes: bool | None = None
    """Compute a prefix that several examples of a step share, such as an instruction with all labels, only once. Losses
    and gradients are the same. Default: on if it is exact, that is, without dropout, noise and padding."""
    compile: bool | None = None
    """Use torch.compile, layer by layer. Default: on for CUDA, off for CPUs, where it is not worthwhile."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass. Default: on only if the memory plan needs it."""
    deterministic: bool = False
    """Use deterministic kernels: results on GPUs are bit-for-bit reproducible, but training is slower."""
    validate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between validations. Default: four validations per epoch."""
    validation_rows: Annotated[int, Field(ge=1)] = 512
    """Maximum number of validation examples used during training."""
    early_stopping: EarlyStopping | None = None
    """Stop training when the validation metric no longer improves."""
    keep_best: bool = True
    """Export the checkpoint with the best validation loss, instead of the last one."""
    resume_from: ResumeFrom | None = None
    """Start from the weights and optimizer state of another job's checkpoint."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.scheduler.type != 'constant' || self.minLearningRateRatio == 0.0",
            "the constant schedule does not decay, so minLearningRateRatio has no effect: remove it, "
            "or choose cosine, linear or wsd",
            ".minLearningRateRatio",
        ),
    )

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run, at least 1; `examples` are those of one epoch of the mixture.

        Each epoch begins with a new step: whole ones take ceil(examples / batch) steps, and a last part of one
        ceil(round(part * examples) / batch).
        """
        whole = floor(self.epochs)
        part = round((self.epochs - whole) * examples)
        batch = self.global_batch_size
        return self.max_steps or max(1, whole * ceil(examples / batch) + ceil(part / batch))


class Topology(ApiModel):
    """Nodes and GPUs to train on."""

    nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of pods that train together."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs (and processes) per pod. 0 trains on CPUs with one process per pod. Default: 1; locally, all GPUs."""
    gpu_type: Annotated[str, StringConstraints(max_length=63)] | None = None
    """GPU type, such as `A100-80GB`, for the memory plan, time and price. It does not select nodes: use
    `podTemplate.nodeSelector`."""
    sharding: Literal["full", "hybrid"] = "full"
    """`full` shards over all ranks. `hybrid` shards within a node and replicates across nodes."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.gpuType) || !has(self.gpusPerNode) || self.gpusPerNode > 0",
            "gpusPerNode: 0 trains on CPUs, so gpuType has no effect: remove one of them",
            ".gpuType",
        ),
    )


class Checkpoint(ApiModel):
    """When checkpoints are saved."""

    every_minutes: Annotated[float, Field(ge=0)] = 10
    """Minutes between checkpoints. 0 saves after every step."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Number of newest checkpoints to keep, in addition to the best one."""


class CacheVolume(ApiModel):
    """The claim for downloads, shared by all jobs."""

    claim_name: Name = "finetune-cache"
    """PersistentVolumeClaim in the job's namespace, created by you. All stages except Prepare mount it read-only."""


class RunVolume(ApiModel):
    """The job's own volume: prepared data, checkpoints, export."""

    claim_name: Name | None = None
    """Existing claim to use. If not set, a claim is created with the fields below."""
    size: Quantity = "100Gi"
    """Size of the claim that is created, such as `200Gi`."""
    storage_class_name: KubernetesName | None = None
    """Storage class of the claim that is created. If not set, the cluster's default."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] | None = None
    """Access mode. Default: ReadWriteMany for several nodes, ReadWriteOnce for one."""
    keep: bool = True
    """Keep the claim when the job is deleted."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.claimName) || (self.size == '100Gi' && !has(self.storageClassName) && !has(self.accessMode))",
            "size, storageClassName and accessMode apply to a claim that is created and have no effect on an existing "
            "one: remove them, or remove claimName",
            ".claimName",
        ),
        Rule(
            "!has(self.claimName) || self.keep",
            "an existing claim is never deleted: remove keep: false, or remove claimName",
            ".keep",
        ),
    )


class Storage(ApiModel):
    """Persistent volumes. Not used by `finetune run`."""

    cache: CacheVolume = CacheVolume()
    """Volume for downloads, shared by all jobs."""
    run: RunVolume = RunVolume()
    """Volume for the job's own data."""


class Gate(ApiModel):
    """Requirements for publishing."""

    must_improve: bool = True
    """The model must be better than the untuned one: the 95% interval of the difference is above 0 for the macro-mean,
    and not below 0 for any dataset."""
    minimum: Annotated[dict[str, float], Field(max_length=64)] = {}
    """Minimum values for metrics of the tuned model, such as `{banking77/accuracy: 0.9}`."""


class Evaluation(ApiModel):
    """How the exported model is evaluated."""

    baseline: bool = True
    """Also evaluate the untuned model, on the same rows and prompts."""
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of training examples in the prompt of an additional few-shot baseline. 0 disables it."""
    gate: Gate = Gate()
    """Requirements for publishing."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of held-out rows to evaluate per dataset, drawn with the split's seed. Default: all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Maximum number of tokens of a generated answer (question answering, summaries, `prompts`). A model that thinks
    before it answers gets up to 16 times as many for its thoughts, which are not scored."""
    prompts: Annotated[list[Text], Field(max_length=64)] = []
    """Prompts that the base and the tuned model answer side by side in the report."""
    metrics: Annotated[
        list[Literal["accuracy", "macro-f1", "exact-match", "f1", "rouge", "bleu", "perplexity"]], Field(max_length=16)
    ] = []
    """Metrics in addition to each task's own (accuracy, F1, ROUGE-L or loss), for the tasks that support them."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.baseline || !self.gate.mustImprove",
            "mustImprove compares with the untuned model, which is not evaluated with baseline: false: "
            "remove baseline, or set mustImprove: false",
            ".gate.mustImprove",
        ),
        Rule(
            "self.baseline || self.fewShot == 0",
            "fewShot prompts the untuned model, which is not evaluated with baseline: false: "
            "remove baseline or fewShot",
            ".fewShot",
        ),
    )


class Publish(ApiModel):
    """Where to publish the result."""

    repo: RepoId | None = None
    """Hub repository to upload to. Created if it does not exist."""
    path: Path | None = None
    """Directory, instead of `repo`. Relative to the run volume on a cluster, to the job file locally."""
    private: bool = True
    """The repository must be private. An existing public repository is refused."""
    format: Literal["adapter", "merged"] = "adapter"
    """Publish the adapter, or the base model with the adapter merged in. Full tuning always publishes the model."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        ONE_SOURCE,
        Rule(
            "has(self.repo) || self.private",
            "private applies to a Hub repository and has no effect with path: remove it",
            ".private",
        ),
    )


class Wandb(ApiModel):
    """Weights & Biases."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    """Project to log the run to."""
    entity: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Team or user. If not set, the default of the API key."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes the run next to the logs, to be synced later."""


class Tracking(ApiModel):
    """Experiment trackers. A broken tracker never stops a training."""

    wandb: Wandb | None = None
    """Weights & Biases."""


class SecretKey(ApiModel):
    """A key of a Secret in the job's namespace."""

    name: SecretName
    """Name of the Secret."""
    key: Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)] = "token"
    """Key in the Secret."""


class Credentials(ApiModel):
    """Tokens, each mounted as a file in a single stage. Locally, set HF_TOKEN, HF_PUBLISH_TOKEN and WANDB_API_KEY."""

    hub: SecretKey | None = None
    """Hub read token. Only Prepare sees it."""
    publish: SecretKey | None = None
    """Hub write token. Only Publish and the check of write access before Prepare see it. Default: `hub`."""
    wandb: SecretKey | None = None
    """W&B key. Only Train sees it."""


class Retry(ApiModel):
    """Retries after failures."""

    limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Number of failures (crash, hang, out of memory) retried per stage. Preemption and node loss do not count."""


class Timeouts(ApiModel):
    """Time limits."""

    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """Maximum running time over all attempts, in seconds. Time in a queue does not count. Default: no limit."""
    startup: Duration = "15m"
    """Time for all pods to start and connect, counted from the first running pod."""
    hang: Duration = "20m"
    """Time without a step after which the ranks write their stacks and the attempt is retried. Prepare, which has no
    ranks, is retried after it has reported nothing for twice this time and `startup`."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "duration(self.startup) >= duration('1m')",
            "pods need at least one minute to start and connect: set 1m or more",
            ".startup",
        ),
        Rule(
            "duration(self.hang) >= duration('1m')",
            "with less than one minute, a slow step would be taken for a hang: set 1m or more",
            ".hang",
        ),
    )


class Cleanup(ApiModel):
    """What is deleted after the job has ended. The FineTuneJob itself is always kept."""

    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    """Seconds after the end of the job until its pods and other children are deleted. Default: they are kept."""


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    key: KubernetesName | None = None
    """Taint key."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How key and value are compared."""
    value: LabelValue | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect. If not set, all effects."""
    toleration_seconds: int | None = None
    """Seconds for which a NoExecute taint is tolerated."""


class EnvVar(ApiModel):
    """An environment variable given by value."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    """Name of the variable."""
    value: Annotated[str, StringConstraints(max_length=4096)]
    """Value. Do not put secrets here; use `credentials`."""


OTHER_GPUS = ("nvidia.com/mig-", "nvidia.com/gpu.", "amd.com/", "gpu.intel.com/", "habana.ai/")
"""Accelerators that topology.gpusPerNode does not count."""


def _no_other_gpus(kind: str) -> Rule:
    given = " || ".join(f"k.startsWith('{prefix}')" for prefix in OTHER_GPUS)
    return Rule(
        f"!self.{kind}.exists(k, {given})",
        "only whole NVIDIA GPUs are supported; MIG slices, shared GPUs and accelerators of other vendors would bypass "
        "the queue and the GPU hours: remove them, and set topology.gpusPerNode",
        f".{kind}",
    )


class Resources(ApiModel):
    """CPU, memory and other resources of a pod. GPUs are set in `topology`."""

    requests: Resource = {}
    """Requests, such as `{cpu: 8, memory: 64Gi}`."""
    limits: Resource = {}
    """Limits."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(
                f"!('nvidia.com/gpu' in self.{kind})",
                "GPUs are set in topology.gpusPerNode: remove nvidia.com/gpu",
                f".{kind}",
            )
            for kind in ("requests", "limits")
        ),
        *(_no_other_gpus(kind) for kind in ("requests", "limits")),
    )


RESERVED_PREFIXES = ("app.kubernetes.io/", "finetune.dev/", "training.kubeflow.org/", "kueue.x-k8s.io/")
"""Labels and annotations that the operator and the controllers it works with write themselves."""


def _no_reserved(kind: str) -> Rule:
    own = " || ".join(f"k.startsWith('{prefix}')" for prefix in RESERVED_PREFIXES)
    return Rule(
        f"!self.{kind}.exists(k, {own})",
        f"{', '.join(RESERVED_PREFIXES)} are reserved for the operator and the controllers it works with: "
        "use your own prefix (set a Kueue queue with queueName)",
        f".{kind}",
    )


class PodTemplate(ApiModel):
    """Settings for the pods of all stages, unless a field names certain stages."""

    node_selector: Labels = {}
    """Node labels required by Train and Evaluate, and by Prepare if it binds a new claim."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints tolerated by the pods that `nodeSelector` applies to. Include that of GPU nodes, unless the cluster adds
    it."""
    priority_class_name: KubernetesName = ""
    """PriorityClass of the pods."""
    queue_name: LabelValue = ""
    """Kueue LocalQueue in the job's namespace, used by Train and Evaluate if they request GPUs."""
    labels: Labels = {}
    """Additional labels of the pods."""
    annotations: Annotated[dict[str, Annotated[str, StringConstraints(max_length=4096)]], Field(max_length=64)] = {}
    """Additional annotations of the pods."""
    env: Annotated[list[EnvVar], Field(max_length=128)] = []
    """Additional environment variables of the trainer in all stages."""
    resources: Resources = Resources()
    """CPU, memory and other resources of each pod of Train and Evaluate."""
    cpu_resources: Resources = Resources()
    """The same for the pods of Prepare and Publish, which use no GPU. Without a memory limit of your own it is 32Gi for
    Prepare and 8Gi for Publish."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        _no_reserved("labels"),
        _no_reserved("annotations"),
        Rule(
            "!self.env.exists(e, e.name.matches("
            "'^(FINETUNE_.*|PET_.*|TORCHELASTIC_.*|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT))$'))",
            "FINETUNE_*, PET_*, TORCHELASTIC_*, RANK, WORLD_SIZE, LOCAL_* and MASTER_* identify the ranks "
            "and are set by the operator: remove them",
            ".env",
        ),
        Rule(
            "!self.env.exists(e, e.name.matches('(?i)^(HF|HUGGING_?FACE|WANDB).*(TOKEN|SECRET|PASSWORD|API_?KEY)') "
            "&& !e.name.startsWith('HF_HUB_DISABLE_'))",
            "a token in env can be read by everyone who can read the job: store it in a Secret and name the Secret "
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
"""When each field of the spec may change. What a job computes is fixed when it is created."""

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


BY_NAME: Any = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
"""Entries are merged by name: else the defaults that the API server fills in look like the work of another applier."""


LOW_RANK = f"self.tuning.method in {[str(method) for method in Method if method.traits.low_rank]}"
PREPENDS_TOKENS = f"self.tuning.method in {[str(method) for method in Method if method.traits.prepends_tokens]}"


class FineTuneJobSpec(ApiModel):
    """What to train, where, and what to do with the result."""

    model: Model
    """The base model."""
    datasets: Annotated[list[Dataset], Field(min_length=1, max_length=64, json_schema_extra=BY_NAME)]
    """Datasets to train on together."""
    split: Split = Split()
    """How rows are split if a dataset has no splits of its own."""
    tuning: Tuning
    """Tuning method and its settings."""
    training: Training = Training()
    """Training settings."""
    topology: Topology = Topology()
    """Nodes and GPUs to train on."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are saved."""
    storage: Storage = Storage()
    """Persistent volumes."""
    evaluation: Evaluation = Evaluation()
    """How the exported model is evaluated."""
    publish: Publish | None = None
    """Where to publish the result. If not set, it stays on the run volume."""
    tracking: Tracking = Tracking()
    """Experiment trackers."""
    credentials: Credentials = Credentials()
    """Tokens."""
    retry: Retry = Retry()
    """Retries after failures."""
    timeouts: Timeouts = Timeouts()
    """Time limits."""
    cleanup: Cleanup = Cleanup()
    """What is deleted after the job has ended."""
    suspend: bool = False
    """Save a checkpoint, stop, and release the GPUs. Set to false to resume."""
    pod_template: PodTemplate = PodTemplate()
    """Settings for the pods."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=500)] | None = None
    """Trainer image, preferably with a digest. If not set, the operator's default."""
    image_pull_secrets: Annotated[list[ImagePullSecret], Field(max_length=16)] = []
    """Secrets for pulling the image."""

    cel_rules: ClassVar[tuple[Rule, ...]] = (
        *_mutability_rules(),
        Rule(
            "self.datasets.all(d, self.datasets.exists_one(other, other.name == d.name))",
            "two datasets have the same name, and metrics are named after it: give each a unique name",
            ".datasets",
        ),
        Rule(
            f"!has(self.model.adapter) || {LOW_RANK}",
            "adapter is a LoRA adapter to continue training: choose the method lora or qlora, or remove adapter",
            ".model.adapter",
        ),
        Rule(
            f"!has(self.model.adapter) || ({_as_by_default('self.tuning.lora', Lora, but='b_plus_ratio')})",
            "an existing adapter keeps its shape, so only bPlusRatio of tuning.lora has an effect: "
            "remove the other fields",
            ".tuning.lora",
        ),
        Rule(
            "!has(self.model.adapter) || !has(self.training.resumeFrom)",
            "adapter and training.resumeFrom are both starting points: set only one of them",
            ".training.resumeFrom",
        ),
        Rule(
            f"!({PREPENDS_TOKENS}) || !has(self.training.packing) || !self.training.packing",
            "prompt and prefix add their tokens once per sequence, so packed examples would share them: remove packing",
            ".training.packing",
        ),
        Rule(
            "!has(self.training.sharedPrefixes) || !self.training.sharedPrefixes "
            "|| self.tuning.lora.dropout == 0.0 && self.training.neftuneAlpha == 0.0 "
            f"&& !({PREPENDS_TOKENS}) "
            "&& (!has(self.training.packing) || self.training.packing)",
            "sharedPrefixes needs packing and excludes dropout, noise and the methods prompt and prefix: "
            "remove sharedPrefixes, or lora.dropout, neftuneAlpha and packing: false",
            ".training.sharedPrefixes",
        ),
        Rule(
            "self.tuning.method != 'prefix' || !has(self.training.activationCheckpointing) "
            "|| !self.training.activationCheckpointing",
            "prefix passes its keys and values in a cache, which activation checkpointing cannot recompute: "
            "remove activationCheckpointing",
            ".training.activationCheckpointing",
        ),
        Rule(
            f"!({PREPENDS_TOKENS}) || !has(self.publish) || self.publish.format != 'merged'",
            "prompt and prefix are not part of the weights and cannot be merged into them: choose format: adapter",
            ".publish.format",
        ),
        Rule(
            "!(self.model.attention in ['flash', 'flex', 'varlen']) || !has(self.topology.gpusPerNode) "
            "|| self.topology.gpusPerNode > 0",
            "flash, flex and varlen attention need GPUs, and gpusPerNode is 0: choose auto, sdpa or eager",
            ".model.attention",
        ),
        Rule(
            "!(self.model.attention in ['flash', 'varlen']) || self.training.precision != 'fp32'",
            "flash and varlen attention support only 16-bit precision: choose another attention, or another precision",
            ".model.attention",
        ),
        Rule(
            f"self.model.attention != 'varlen' || !({PREPENDS_TOKENS}) "
            "&& (!has(self.training.packing) || self.training.packing)",
            "varlen attention needs packed sequences, which prompt, prefix and packing: false do not use: "
            "choose auto, or remove packing",
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
            "|| !has(self.split.validation) || self.split.validation + self.split.test > 0.0 "
            "|| self.datasets.all(d, has(d.splits.validation) || has(d.splits.test))",
            "no rows are held out for the gate: set split.validation or split.test above 0, "
            "or name a validation or test split of each dataset",
            ".split",
        ),
        Rule(
            "!has(self.training.earlyStopping) || !has(self.split.validation) || self.split.validation > 0.0 "
            "|| self.datasets.exists(d, has(d.splits.validation))",
            "early stopping needs validation rows, and there are none: set split.validation above 0, "
            "or name a dataset's validation split",
            ".training.earlyStopping",
        ),
        Rule(
            "self.evaluation.gate.minimum.all(key, key.startsWith('macro/') "
            "|| self.datasets.exists(d, key.startsWith(d.name + '/')))",
            "keys of minimum must be <dataset>/<metric> with a dataset of this job, such as banking77/accuracy, "
            "or macro/<metric>",
            ".evaluation.gate.minimum",
        ),
    )

    @property
    def reads_hub(self) -> bool:
        """Whether the model, its adapter or a dataset comes from a repository."""
        return any(source is not None and source.repo for source in (self.model, self.model.adapter, *self.datasets))


class ObjectMeta(ApiModel):
    """The fields of Kubernetes metadata that are read here. Others are kept unchanged."""

    model_config = ApiModel.model_config | {"extra": "allow"}

    name: str
    namespace: Namespace = "default"
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
            "a job's name becomes part of host names: use at most 63 lower-case letters, digits and '-', "
            "beginning and ending with a letter or digit",
            ".metadata.name",
        ),
    )
