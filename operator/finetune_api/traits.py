"""What is true of each tuning method and of each task, in one table each.

The rest of the code asks `method.traits` and `task.traits` and never compares with a name, so that a new method or
task is one row here and one implementation (docs/extending.md). Knows nothing of the spec.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Literal


class Method(StrEnum):
    """How the model is tuned."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    PROMPT = "prompt"
    PREFIX = "prefix"

    @property
    def traits(self) -> MethodTraits:
        """Its row of the table."""
        return METHODS[self]


@dataclass(frozen=True, kw_only=True)
class MethodTraits:
    """What is true of a tuning method."""

    title: str
    """As people write it."""
    default_learning_rate: float
    blocks: tuple[str, ...] = ()
    """Fields of `tuning` that it uses; the first holds its own settings."""
    lighter: tuple[Method, ...] = ()
    """Methods that need less memory, the closest first."""
    trains_base: bool = False
    """The base model's own weights are trained, and exported whole."""
    low_rank: bool = False
    """Trains low-rank adapters of linear layers."""
    four_bit: bool = False
    """The base is stored in 4 bits, for which Prepare writes a copy."""
    prepends_tokens: bool = False
    """Trained positions stand once before the input."""
    can_recompute: bool = True
    """Works with activation checkpointing."""

    @property
    def can_pack(self) -> bool:
        """Whether documents may share a row: they would see each other's prepended tokens."""
        return not self.prepends_tokens

    @property
    def can_merge(self) -> bool:
        """Whether what is trained can be added to the base model's weights."""
        return not self.prepends_tokens


METHODS: dict[Method, MethodTraits] = {
    Method.FULL: MethodTraits(
        title="full fine-tuning", default_learning_rate=1e-5, lighter=(Method.LORA, Method.QLORA), trains_base=True
    ),
    Method.LORA: MethodTraits(
        title="LoRA", default_learning_rate=2e-4, blocks=("lora",), lighter=(Method.QLORA,), low_rank=True
    ),
    Method.QLORA: MethodTraits(
        title="QLoRA", default_learning_rate=2e-4, blocks=("lora", "quantization"), low_rank=True, four_bit=True
    ),
    Method.PROMPT: MethodTraits(
        title="prompt tuning", default_learning_rate=1e-2, blocks=("prompt",), prepends_tokens=True
    ),
    Method.PREFIX: MethodTraits(
        title="prefix tuning",
        default_learning_rate=5e-3,
        blocks=("prefix",),
        prepends_tokens=True,
        can_recompute=False,  # its keys and values are handed over in a cache
    ),
}


class Task(StrEnum):
    """What one dataset teaches; decides how its rows become prompts and how they are scored."""

    CLASSIFICATION = "classification"
    MULTIPLE_CHOICE = "multiple-choice"
    QUESTION_ANSWERING = "question-answering"
    INSTRUCTION = "instruction"
    CHAT = "chat"
    SUMMARIZATION = "summarization"
    TEXT = "text"

    @property
    def traits(self) -> TaskTraits:
        """Its row of the table."""
        return TASKS[self]


class Scoring(Enum):
    """How a held-out row is scored, as the report says it."""

    CANDIDATES = "Closed answers: the candidate with the highest log-probability, end token included."
    GENERATION = "Free answers: greedy decoding."
    LIKELIHOOD = (
        "Instructions, chat and text: likelihood of the held-out tokens (neg-loss is minus the mean loss in nats)."
    )


@dataclass(frozen=True, kw_only=True)
class TaskTraits:
    """What is true of a task."""

    title: str
    """As a model card writes it."""
    hub_task: str
    """The Hub's name for it (https://huggingface.co/tasks)."""
    columns: tuple[str, ...]
    """The fields of `columns` that it reads. Another one would have no effect, and is refused."""
    optional_columns: tuple[str, ...] = ()
    """Those of them that the data may lack."""
    form: Literal["question", "chat", "text"] = "question"
    """What a row becomes: a chat of one question and one answer, its turns as they are, or plain text."""
    scoring: Scoring
    metrics: tuple[str, ...]
    """Metrics that are always measured; the gate reads the first."""
    template: str = ""
    """Jinja template of the prompt."""
    variables: tuple[str, ...]
    """What a user's template may use in addition to the columns."""
    without_effect: tuple[str, ...] = ()
    """Fields of a dataset that it does not read."""
    cut_from: str = ""
    """What is cut at its end where a prompt is too long. Where there is nothing to cut, the row is left out."""
    has_labels: bool = False
    """All rows share one closed set of answers."""
    may_be_unanswerable: bool = False
    """A row may have no answer."""
    trained_share: float | None = None
    """Share of an example's tokens that are trained on, assumed before the data are read; None: a label's few."""

    @property
    def primary_metric(self) -> str:
        """The metric that the gate reads; higher is better for all of them."""
        return self.metrics[0]


TASKS: dict[Task, TaskTraits] = {
    Task.CLASSIFICATION: TaskTraits(
        title="Text classification",
        hub_task="text-classification",
        columns=("text", "label"),
        scoring=Scoring.CANDIDATES,
        metrics=("accuracy", "macro-f1"),
        template="Classify the text. Answer with one of: {{ labels | join(', ') }}.\n\nText: {{ text }}",
        variables=("text", "label", "labels"),
        cut_from="text",
        has_labels=True,
    ),
    Task.MULTIPLE_CHOICE: TaskTraits(
        title="Multiple choice",
        hub_task="multiple-choice",
        columns=("question", "choices", "answer", "context"),
        optional_columns=("context",),
        scoring=Scoring.CANDIDATES,
        metrics=("accuracy",),
        template=(
            "{% if context %}{{ context }}\n\n{% endif %}{{ question }}\n\nAnswer with one of:\n"
            "{% for choice in choices %}- {{ choice }}\n{% endfor %}"
        ),
        variables=("question", "choices", "context", "answer"),
    ),
    Task.QUESTION_ANSWERING: TaskTraits(
        title="Question answering",
        hub_task="question-answering",
        columns=("question", "answer", "context"),
        optional_columns=("context",),
        scoring=Scoring.GENERATION,
        metrics=("f1", "exact-match"),
        template=(
            "{% if context %}Answer the question from the text."
            "{% if may_be_unanswerable %} If the text does not answer it, say: {{ unanswerable }}.{% endif %}"
            "\n\nText: {{ context }}\n\nQuestion: {{ question }}{% else %}{{ question }}{% endif %}"
        ),
        variables=("question", "context", "answer", "may_be_unanswerable", "unanswerable"),
        may_be_unanswerable=True,
        trained_share=0.1,
    ),
    Task.INSTRUCTION: TaskTraits(
        title="Instruction following",
        hub_task="text-generation",
        columns=("prompt", "input", "completion", "system"),
        optional_columns=("input", "system"),
        scoring=Scoring.LIKELIHOOD,
        metrics=("neg-loss", "perplexity"),
        template="{{ prompt }}{% if input %}\n\n{{ input }}{% endif %}",
        variables=("prompt", "input", "completion", "answer"),
        trained_share=0.5,
    ),
    Task.CHAT: TaskTraits(
        title="Chat",
        hub_task="text-generation",
        columns=("messages", "tools", "system"),
        optional_columns=("tools", "system"),
        form="chat",
        scoring=Scoring.LIKELIHOOD,
        metrics=("neg-loss", "perplexity"),
        variables=("messages",),
        without_effect=("template", "answerTemplate"),
        trained_share=0.5,
    ),
    Task.SUMMARIZATION: TaskTraits(
        title="Summarization",
        hub_task="summarization",
        columns=("document", "summary"),
        scoring=Scoring.GENERATION,
        metrics=("rouge-l", "rouge-1", "rouge-2"),
        template="Summarise the text.\n\n{{ document }}",
        variables=("document", "summary", "answer"),
        cut_from="document",
        trained_share=0.2,
    ),
    Task.TEXT: TaskTraits(
        title="Text",
        hub_task="text-generation",
        columns=("text",),
        form="text",
        scoring=Scoring.LIKELIHOOD,
        metrics=("neg-loss", "perplexity"),
        template="{{ text }}",
        variables=("text",),
        without_effect=("answerTemplate", "systemPrompt"),
        trained_share=1.0,
    ),
}

USUAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "content", "tweet", "review", "utterance", "query", "comment", "claim", "document"),
    "label": ("label", "labels", "sentiment", "category", "intent", "class", "target", "topic", "answer"),
    "question": ("question", "query", "prompt", "goal", "question_stem", "sentence", "ctx"),
    "choices": ("choices", "options", "endings", "candidates"),
    "answer": ("answer", "answerKey", "answers", "answer_key", "label", "target", "gold", "gold_label", "cop"),
    "context": ("context", "passage", "paragraph", "article"),
    "prompt": ("prompt", "instruction", "instructions", "question", "query", "problem", "inputs", "input"),
    "input": ("input", "context"),
    "completion": ("completion", "output", "response", "answer", "solution", "target", "targets"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "tools": ("tools", "functions"),
    "system": ("system", "system_prompt"),
    "document": ("document", "article", "text", "dialogue", "source", "content"),
    "summary": ("summary", "highlights", "abstract", "target", "headline", "tldr"),
}
"""Names under which each of the columns is looked for, the most usual first; case does not matter."""
