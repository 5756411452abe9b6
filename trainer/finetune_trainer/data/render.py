"""From an example to what the model sees, with its loss mask: one function for training, evaluation and preview.

Every task is a chat of one question and one answer, but for `chat` (the turns as they are) and `text` (no chat).
Answers are never cut: a question's text is cut where the task allows it, else the row does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune_api.report import FailureClass
from finetune_api.traits import Scoring, Task
from finetune_trainer.data.chat import ChatFormat, ChatTemplateError, LabelledTokens, LabelsError, split_system
from finetune_trainer.data.chat_turns import answer_turns
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.data.examples import UNANSWERABLE, Example
from finetune_trainer.data.messages import LEFT_OUT_END, BadRowError, Chat, Message
from finetune_trainer.data.templates import TemplateRowError, compile_template
from finetune_trainer.failures import TrainerError

MAX_CUTS = 8
SYSTEM_IN_FIRST_TURN = "the chat template has no place for system prompts: they stand before the first user turn"


@dataclass(frozen=True)
class Rendering:
    """How the rows of one dataset are rendered. Made once per dataset, with the same values for all its splits."""

    task: Task
    format: ChatFormat
    max_tokens: int
    """Tokens of a document at most."""
    labels: tuple[str, ...] = ()
    """Closed set of a classification."""
    may_be_unanswerable: bool = False
    system_prompt: str | None = None
    template: str = ""
    """Jinja; the task's own where empty."""
    answer_template: str = ""
    """Jinja; `{{ answer }}` where empty."""
    loss_on: Literal["all", "last"] = "all"
    special_tokens: bool = False
    """Task text: read special tokens in the rows as such."""
    dataset: str = ""
    """Its name in the spec, for sentences."""
    label_column: str = ""
    """Column whose value in an answer template is each candidate in turn."""

    @property
    def constants(self) -> dict[str, Any]:
        """Template variables that are the same in every row."""
        return {
            "labels": list(self.labels),
            "may_be_unanswerable": self.may_be_unanswerable,
            "unanswerable": UNANSWERABLE,
        }


@dataclass(frozen=True, slots=True)
class Rendered:
    """The documents of one row."""

    documents: list[LabelledTokens]
    cut_tokens: int = 0
    """Tokens by which the prompt was cut to fit."""
    dropped_turns: int = 0
    """Oldest messages of a chat that were dropped whole to fit."""
    checked: int = 0
    """Documents whose tokens are those of the chat template."""
    notes: frozenset[str] = frozenset()
    """What of a chat is not rendered as it stands in the row, each in a few words."""


@dataclass(frozen=True, slots=True)
class _Question:
    messages: list[Message]
    text: str
    ids: list[int]
    cut_tokens: int = 0


@dataclass(frozen=True)
class FewShot:
    """Solved examples that go before a question as turns of the chat."""

    turns: list[Message] = field(default_factory=list)


def render_training(rendering: Rendering, example: Example) -> Rendered:
    """Documents to learn from. Raises BadRowError where the row does not fit or the template refuses it."""
    try:
        if rendering.task.traits.form == "text":
            return Rendered(_text_documents(rendering, example))
        if example.chat is not None:
            return _chat_documents(rendering, example.chat)
        answer = rendering.format.answer_ids(answer_text(rendering, example, example.answer))
        question = _question(rendering, example, room=rendering.max_tokens - len(answer))
        return Rendered([LabelledTokens.of([(question.ids, False), (answer, True)])], question.cut_tokens)
    except (ChatTemplateError, TemplateRowError) as error:
        raise BadRowError(str(error)) from error
    except LabelsError as error:
        of = f" of {rendering.dataset}" if rendering.dataset else ""
        raise TrainerError(
            FailureClass.BAD_SPEC, f"Row {example.row:,}{of} cannot be trained on: {error}.", "model.chatTemplate"
        ) from error


def render_evaluation(
    rendering: Rendering, example: Example, dataset: str, *, answer_tokens: int = 0, few_shot: FewShot | None = None
) -> list[EvaluationRow]:
    """Held-out rows as they are scored (several only for chats and texts that make several documents).

    answer_tokens: room kept for a generated answer. Raises BadRowError as `render_training` does.
    """
    key = f"{dataset}/{example.row}"
    if rendering.task.traits.scoring is Scoring.LIKELIHOOD:
        rendered = render_training(rendering, example).documents
        ids = [key] if len(rendered) == 1 else [f"{key}#{number}" for number in range(1, len(rendered) + 1)]
        return [
            EvaluationRow(
                id=name,
                dataset=dataset,
                task=rendering.task.value,
                ids=document.ids,
                target_position=document.target_position,
                target_id=document.target_id,
            )
            for name, document in zip(ids, rendered, strict=True)
        ]
    try:
        return [_evaluation_row(rendering, example, key, dataset, answer_tokens, few_shot)]
    except (ChatTemplateError, TemplateRowError) as error:
        raise BadRowError(str(error)) from error


def _evaluation_row(
    rendering: Rendering, example: Example, key: str, dataset: str, answer_tokens: int, few_shot: FewShot | None
) -> EvaluationRow:
    candidates, gold = _candidates(rendering, example)
    texts = [answer_text(rendering, example, candidate) for candidate in candidates or []]
    candidate_ids = [rendering.format.answer_ids(text) for text in texts]
    longest = max(map(len, candidate_ids), default=min(answer_tokens, rendering.max_tokens // 2))
    question = _question(rendering, example, room=rendering.max_tokens - longest)
    shown = None
    if few_shot is not None:
        shown = _few_shot_ids(rendering, question, few_shot, room=rendering.max_tokens - longest)
    return EvaluationRow(
        id=key,
        dataset=dataset,
        task=rendering.task.value,
        prompt=question.text,
        prompt_ids=question.ids,
        candidates=candidates,
        candidate_ids=candidate_ids if candidates else None,
        gold=gold,
        answers=[answer_text(rendering, example, answer) for answer in example.answers],
        text=example.text,
        few_shot_prompt_ids=shown,
    )


def _candidates(rendering: Rendering, example: Example) -> tuple[list[str] | None, int | None]:
    if rendering.task.traits.has_labels:
        return list(rendering.labels), rendering.labels.index(example.answer)
    return example.candidates, example.gold


def question_text(rendering: Rendering, variables: Mapping[str, Any]) -> str:
    """The prompt of a row, before the chat template."""
    return compile_template(rendering.template or rendering.task.traits.template)(
        {**variables, **rendering.constants}
    ).strip()


def answer_text(rendering: Rendering, example: Example, answer: str) -> str:
    """An answer of a row as the model has to write it."""
    if not rendering.answer_template:
        return answer
    named = {name: answer for name in ("answer", "label", "summary", "completion", rendering.label_column) if name}
    text = compile_template(rendering.answer_template)({**example.variables, **rendering.constants, **named}).strip()
    if not text:
        raise BadRowError("the answer template renders an empty answer")
    return text


def few_shot_of(rendering: Rendering, examples: Sequence[Example]) -> FewShot:
    """Solved examples as turns; those that a template refuses are left out."""
    turns: list[Message] = []
    for example in examples:
        try:
            question = question_text(rendering, example.variables)
            answer = answer_text(rendering, example, example.answer)
        except (TemplateRowError, BadRowError):
            continue
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return FewShot(turns)


def _question(rendering: Rendering, example: Example, room: int) -> _Question:
    """The rendered prompt in at most `room` tokens, its text cut at the end where the task allows that."""
    variables = dict(example.variables)
    cut = rendering.task.traits.cut_from
    removed = 0
    for _ in range(MAX_CUTS):
        own: list[Message] = [{"role": "system", "content": example.system}] if example.system else []
        asked: Message = {"role": "user", "content": question_text(rendering, variables)}
        messages = rendering.format.with_system(rendering.system_prompt, [*own, asked])
        text, ids = rendering.format.prompt(messages)
        excess = len(ids) - room
        if excess <= 0:
            return _Question(messages, text, ids, removed)
        shorter = _cut_text(rendering.format, str(variables[cut]), excess) if cut in variables else ""
        if not shorter:
            break
        removed += excess
        variables = _with_shorter(variables, cut, shorter)
    raise BadRowError(f"{len(ids) + rendering.max_tokens - room:,} tokens do not fit into {rendering.max_tokens:,}")


def _with_shorter(variables: dict[str, Any], role: str, shorter: str) -> dict[str, Any]:
    """The variables with the long text cut wherever it stands: under its role and under its column's name."""
    long = variables[role]
    return {
        name: shorter if name == role or (isinstance(value, str) and value.strip() == long) else value
        for name, value in variables.items()
    }


def _cut_text(chat: ChatFormat, text: str, tokens: int) -> str:
    """The text without about its last `tokens` tokens, never shorter than by them; empty where nothing is left."""
    whole = chat.count(text)
    if whole <= tokens:
        return ""
    share = (whole - tokens) / whole
    kept = text[: int(len(text) * share)]
    while kept and chat.count(kept) > whole - tokens:
        kept = kept[: int(len(kept) * 0.95)]
    return kept.rstrip()


def _few_shot_ids(rendering: Rendering, question: _Question, few_shot: FewShot, room: int) -> list[int]:
    """The prompt after as many solved examples as fit."""
    system, asked = split_system(question.messages)
    turns = few_shot.turns
    while True:
        _, ids = rendering.format.prompt([*system, *turns, *asked])
        if len(ids) <= room or not turns:
            return ids
        turns = turns[:-2]


def _chat_documents(rendering: Rendering, chat: Chat) -> Rendered:
    """The chat's documents; where they are too long, the oldest turns are dropped whole until they fit."""
    turns = rendering.format.with_system(rendering.system_prompt, chat.messages)
    before = len(turns)
    while True:
        trained = _trained_turns(rendering, turns, chat.trained)
        documents = rendering.format.documents(turns, trained, chat.tools)
        labelled = [rendering.format.tokens(document) for document in documents]
        excess = max(len(tokens.ids) for tokens, _ in labelled) - rendering.max_tokens
        if excess <= 0:
            break
        shorter = _without_oldest(rendering, turns, excess)
        if shorter is None:
            raise BadRowError(f"the last exchange alone has more than {rendering.max_tokens:,} tokens")
        turns = shorter
    notes = {*chat.notes, *(note for document in documents for note in document.notes)}
    notes.update(note for _, found in labelled for note in found)
    if trained[-1] + 1 < len(turns):
        notes.add(LEFT_OUT_END)
    if not rendering.format.takes_system and (rendering.system_prompt or chat.messages[0]["role"] == "system"):
        notes.add(SYSTEM_IN_FIRST_TURN)
    exact = sum(not found for _, found in labelled)
    return Rendered([tokens for tokens, _ in labelled], 0, before - len(turns), exact, frozenset(notes))


def _trained_turns(rendering: Rendering, turns: Sequence[Message], wanted: Sequence[bool]) -> list[int]:
    """Which messages are trained on. `turns` end as the row does, so `wanted` counts from the end."""
    answers = answer_turns([message["role"] for message in turns])
    chosen = answers if rendering.loss_on == "all" else answers[-1:]
    trained = [turn for turn in chosen if wanted[turn - len(turns)]]
    if not trained:
        raise BadRowError(
            f"no answer is left to train on (weight or train, lossOn: {rendering.loss_on}, "
            f"maxSequenceLength: {rendering.max_tokens:,})"
        )
    return trained


def _without_oldest(rendering: Rendering, turns: list[Message], excess: int) -> list[Message] | None:
    """The chat without its oldest exchanges: as many as surely hold no more than `excess` tokens, at least one.

    The system prompt is kept. None where only one exchange is there.
    """
    system, rest = split_system(turns)
    starts = [i for i, message in enumerate(rest) if i > 0 and message["role"] == "user"]
    starts = [i for i in starts if any(message["role"] == "assistant" for message in rest[i:])]
    if not starts:
        return None
    sizes = [rendering.format.count(message["content"]) for message in rest]
    # What the template puts around a turn, rounded up: so never more is dropped than needed.
    around = max(math.ceil((rendering.max_tokens + excess - sum(sizes)) / len(rest)) + 1, 0)
    surely = [i for i in starts if sum(sizes[:i]) + around * i <= excess]
    return [*system, *rest[surely[-1] if surely else starts[0] :]]


def _text_documents(rendering: Rendering, example: Example) -> list[LabelledTokens]:
    """The text in pieces of at most `max_tokens`, the loss on every token but a piece's first."""
    text = question_text(rendering, example.variables) if rendering.template else str(example.variables["text"])
    ids = rendering.format.plain_text_ids(text, special_tokens=rendering.special_tokens)
    return [
        LabelledTokens(piece, list(range(len(piece) - 1)), piece[1:])
        for piece in _pieces(ids, rendering.max_tokens)
        if len(piece) > 1
    ]


def _pieces(ids: list[int], size: int) -> Iterator[list[int]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
