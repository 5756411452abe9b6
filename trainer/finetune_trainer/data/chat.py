"""How a conversation becomes tokens: the same for training, validation, evaluation and `finetune preview`.

A chat is rendered by the tokenizer's own template and cut into segments: context, and what the loss is computed on
(an assistant turn with the token that ends it), found by prefix difference of rendered messages. Segments are tokenised
one by one, so a prompt has the same tokens whether an answer follows or is still to be generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateError

from finetune_trainer.data.chat_turns import TemplateSkeleton, answer_turns, template_skeleton
from finetune_trainer.data.encoding import MarkError, TextEncoder
from finetune_trainer.data.left_out import Tagged
from finetune_trainer.data.limits import within_limits
from finetune_trainer.data.messages import Message

Tools = Sequence[dict[str, Any]]

PLAIN_TEMPLATE = (
    "{{ bos }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Template of a base model that has none; `{{ bos }}` is written in where the tokenizer begins texts with BOS."""

_PROBE_USER, _PROBE_ANSWER = "Question 7Q", "Answer 9Z"
DROPS_THOUGHTS = "the chat template drops thoughts of earlier turns"
TRIMS_ANSWERS = "the chat template takes off the white space that answers begin with"
DROPS_DESCRIPTIONS = "the chat template drops descriptions of functions"


APART = "the tokenizer would join the end of a prompt and its answer to one token; they are kept apart, as in use"


class LabelsError(ValueError):
    """What is to be trained is not what the template and the tokenizer make of the messages."""


class ChatTemplateError(ValueError):
    """The template cannot render these messages; the message says why, in the template's words where it has any."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered chat and whether the loss is computed on it."""

    text: str
    trainable: bool


@dataclass(frozen=True, slots=True)
class ChatDocument:
    """What one training example of a chat is made of."""

    segments: list[Segment]
    spelled: list[str]
    """Special tokens that stand in the data, and are tokenised as plain text."""
    notes: list[str]
    """What of the chat the template leaves out, in a few words."""


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """A tokenised document. The token at index j is the target of position j - 1.

    ids: t token ids; target_position, target_id: l labelled positions.
    """

    ids: list[int]
    target_position: list[int] = field(default_factory=list)
    target_id: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Sequence[tuple[list[int], bool]]) -> LabelledTokens:
        """Join (ids, trainable) pieces. The first token of a document has nothing to be predicted from."""
        ids: list[int] = []
        positions: list[int] = []
        for piece, trainable in pieces:
            if trainable:
                positions.extend(range(max(len(ids) - 1, 0), len(ids) + len(piece) - 1))
            ids.extend(piece)
        return cls(ids, positions, [ids[position + 1] for position in positions])


class ChatFormat:
    """A tokenizer with its chat template, and what was found out about the template by trying it.

    Raises ChatTemplateError at once where the template cannot render a question and its answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self._skeleton = lru_cache(maxsize=1000)(self._find_skeleton)
        self._probe, before, suffix = self._find_probe()
        special = self.encoder.special.search(suffix) if self.encoder.special else None
        self.end_text: str = suffix[: special.end()] if special else ""
        """What follows an answer up to its end token, as text; empty where the template writes no such token."""
        self.around_answer: tuple[str, str] = (before, self.end_text)
        """What the model has to write before and after an answer."""
        self.end_token_ids: list[int] = self._end_tokens(special[0] if special else None)
        """Tokens at which an answer ends; the first is the one that is trained."""
        self._after_end: str = suffix[len(self.end_text) :]
        self.keeps_history: bool = self._has_prefix_property()
        """Whether earlier turns are rendered alike in longer chats. Else each turn is a document of its own."""
        self.takes_system: bool = self._takes_system()
        """Whether the template has a place for a system message. Else it is put before the first user turn."""
        self.implicit_system: str = self._implicit_system()
        """System prompt that the template adds by itself."""
        self._answer_ids = lru_cache(maxsize=10_000)(self._compute_answer_ids)

    def __reduce__(self) -> tuple[type[ChatFormat], tuple[Any]]:
        """A worker process finds the template out anew from the tokenizer."""
        return ChatFormat, (self.tokenizer,)

    # --- text ---

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The template's text for the messages; special tokens in their contents are marked as plain text."""
        return self._render(self._prepared(messages), add_generation_prompt=add_generation_prompt)

    def _render(self, prepared: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = ()) -> str:
        try:
            text = within_limits(
                lambda: self.tokenizer.apply_chat_template(
                    prepared, tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
                ),
                "The chat template",
                "model.chatTemplate",
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"the chat template refuses these messages: {str(error).splitlines()[0]}"
            ) from error
        return str(text)

    def with_system(self, system: str | None, messages: Sequence[Message]) -> list[Message]:
        """The messages after a system prompt, which joins the row's own, or the first user turn if there is no place.

        System messages between turns stay where they are.
        """
        given, turns = split_system(messages)
        whole = "\n\n".join(filter(None, [system, *(message["content"] for message in given)]))
        if not whole or not turns:
            return turns
        if self.takes_system:
            return [{"role": "system", "content": whole}, *turns]
        first = next((i for i, message in enumerate(turns) if message["role"] == "user"), 0)
        joined = turns[first] | {"content": f"{whole}\n\n{turns[first]['content']}"}
        return [*turns[:first], joined, *turns[first + 1 :]]

    def documents(
        self, messages: Sequence[Message], trained: Sequence[int] | None = None, tools: Tools = ()
    ) -> list[ChatDocument]:
        """Documents of a chat that ends with an answer, each a list of segments ending with a trainable one.

        trained: which messages, of those that answer; all of them where left out. One document, or one for each of
        them where the template rewrites earlier turns. Raises ChatTemplateError where the template refuses the
        messages, or leaves out what they say.
        """
        prepared, tools = self._prepared(messages), self._mark(list(tools))
        answers = answer_turns([message["role"] for message in messages])
        trained = answers if trained is None else trained
        if self.keeps_history:
            until = [turn for turn in answers if turn <= trained[-1]]
            document = self._document(prepared[: trained[-1] + 1], until, trained, tools)
            if document is not None:
                return [document]
        alone = [self._document(prepared[: turn + 1], [turn], [turn], tools) for turn in trained]
        return [document for document in alone if document is not None]

    def _document(
        self, prepared: Sequence[Message], turns: Sequence[int], trained: Sequence[int], tools: Tools
    ) -> ChatDocument | None:
        """The document of a chat; None where it does not begin with each of its beginnings."""
        beginnings = self._known_beginnings(prepared, turns, tools)
        segments: list[Segment] = []
        done = ""
        for turn in turns:
            if beginnings is not None:
                prompt, whole = beginnings(turn, True), beginnings(turn + 1, False)
            else:
                prompt = self._render(prepared[:turn], add_generation_prompt=True, tools=tools)
                whole = self._render(prepared[: turn + 1], tools=tools)
            if not prompt.startswith(done):
                return None
            answer = self._after(prompt, whole)
            segments += [Segment(prompt[len(done) :], False), Segment(answer, turn in trained)]
            done = prompt + answer
        notes = self._check_complete(prepared, trained, tools) if beginnings is None else []
        answers = {turn: segment.text for turn, segment in zip(turns, segments[1::2], strict=True)}
        if any(_is_trimmed(prepared[turn]["content"], answers[turn]) for turn in trained):
            notes.append(TRIMS_ANSWERS)
        return ChatDocument(segments, self._checked_marks(done), notes)

    def _known_beginnings(
        self, prepared: Sequence[Message], turns: Sequence[int], tools: Tools
    ) -> Callable[[int, bool], str] | None:
        """(how many messages, whether an answer is asked for) -> the template's text for so many first messages.

        Up to one of `turns`, asked for, and with it, not asked for. None where they have to be rendered one by one.
        """
        if tools or any(len(message) > 2 for message in prepared):
            return None
        skeleton = self._skeleton(tuple(message["role"] for message in prepared), tuple(turns))
        if skeleton is None:
            return None
        try:
            whole = self._render(prepared)
        except ChatTemplateError:
            return None  # which is said where it matters
        ends = skeleton.ends(whole, [message["content"] for message in prepared])
        if ends is None:
            return None
        return lambda count, ask: whole[: ends[count - 1] + skeleton.suffix_lengths[count, ask]]

    def _find_skeleton(self, roles: tuple[str, ...], turns: tuple[int, ...]) -> TemplateSkeleton | None:
        try:
            return template_skeleton(
                lambda messages, ask: self._render(messages, add_generation_prompt=ask), roles, turns
            )
        except ChatTemplateError:
            return None

    def _after(self, prompt: str, whole: str) -> str:
        """The answer with its end token."""
        if not whole.startswith(prompt) or not whole.endswith(self._after_end):
            raise ChatTemplateError(
                "the chat template does not render this answer as a continuation of its prompt, which ends with "
                f"{self.encoder.shown(prompt)[-30:]!r}: set model.chatTemplate"
            )
        answer = whole[len(prompt) : len(whole) - len(self._after_end)]
        if self.end_text and not self.encoder.ends_with_token(answer):
            raise ChatTemplateError("the chat template writes no end token after this answer: set model.chatTemplate")
        return answer

    def _checked_marks(self, text: str) -> list[str]:
        try:
            return self.encoder.marked_tokens(text)
        except MarkError as error:
            raise ChatTemplateError(str(error)) from error

    def _check_complete(self, prepared: Sequence[Message], trained: Sequence[int], tools: Tools) -> list[str]:
        """What the template leaves out without harm. Raises ChatTemplateError for anything else that it leaves out."""
        tagged = Tagged(prepared, tools)
        text = self._render(tagged.messages, tools=tagged.tools)
        notes = []
        for part in tagged.left_out(text):
            if part.what == "thought" and part.message not in trained:
                notes.append(DROPS_THOUGHTS)
            elif part.what == "description of a function":
                notes.append(DROPS_DESCRIPTIONS)
            else:
                whose = f"{part.what} of the {prepared[part.message]['role']} message {part.message + 1}"
                raise ChatTemplateError(
                    f"the chat template leaves out the {whose if part.message >= 0 else part.what} "
                    f"({shortened(part.text)!r}): set model.chatTemplate to one that writes it, or remove it"
                )
        if moved := tagged.moved(text):
            before, behind = (f"the {prepared[part.message]['role']} message {part.message + 1}" for part in moved)
            raise ChatTemplateError(f"the chat template moves {before} before {behind}: set model.chatTemplate")
        return list(dict.fromkeys(notes))

    # --- tokens ---

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """(text, ids) of what the model sees before it answers."""
        text = self.render(messages, add_generation_prompt=True)
        return self.encoder.shown(text), self.encode([Segment(text, False)])[0]

    def answer_ids(self, answer: str) -> list[int]:
        """Tokens of an answer with its end token, as they follow any prompt."""
        return list(self._answer_ids(answer))

    def _compute_answer_ids(self, answer: str) -> tuple[int, ...]:
        turns = [{"role": "user", "content": _PROBE_USER}, {"role": "assistant", "content": answer}]
        [document] = self.documents(turns, [1])
        ids = self.encode(document.segments)[1]
        return tuple(ids if self.end_text else [*ids, self.end_token_ids[0]])

    def tokens(self, document: ChatDocument) -> tuple[LabelledTokens, list[str]]:
        """The tokens of a document, and what is to be noted about them.

        They are those that the library makes of the template's whole text, and begin with those of the prompt alone.
        Where special tokens of the data are plain text, and where a token of the whole text would hold the end of a
        prompt and the beginning of its answer, which no model can write, they are not: that is noted.
        Raises LabelsError for anything else.
        """
        segments = document.segments
        pieces = None if document.spelled else self.encoder.split_ids([segment.text for segment in segments])
        notes = [f"the special token {token} stands in messages, and is plain text" for token in document.spelled]
        if pieces is not None:
            pieces[0] = self._with_one_bos(pieces[0])
        else:
            pieces = self.encode(segments)
            notes = notes or self._compared_to_whole(segments, pieces)
        if not self.end_text:
            pieces[-1] = [*pieces[-1], self.end_token_ids[0]]
        labelled = LabelledTokens.of([(ids, segment.trainable) for ids, segment in zip(pieces, segments, strict=True)])
        if not labelled.target_id:
            raise LabelsError("no token would be trained on")
        return labelled, notes

    def _compared_to_whole(self, segments: Sequence[Segment], pieces: Sequence[list[int]]) -> list[str]:
        """What is to be noted where the pieces are not the tokens of the whole text. Raises LabelsError."""
        ids = [token for piece in pieces for token in piece]
        parts = [""]
        for segment in segments:
            if self.encoder.ends_with_token(parts[-1]):
                parts[-1] += segment.text
            else:
                parts.append(segment.text)
        if self._with_one_bos(self.encoder.whole_ids("".join(parts))) == ids:
            return []
        if self._with_one_bos(self.encoder.separate_ids(parts[1:])) == ids:
            return [APART]
        raise LabelsError("its tokens are not those that the tokenizer makes of the chat template's text")

    def encode(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Ids of each segment; all but the first continue a text that has begun.

        A begin-of-text token is written by the template or not at all, and never twice.
        """
        befores = ["", *(segment.text for segment in segments)]
        encoded = [self.encoder.ids(segment.text, before) for segment, before in zip(segments, befores, strict=False)]
        return [self._with_one_bos(encoded[0]), *encoded[1:]] if encoded else []

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ids[1:] if self.encoder.adds_bos and ids[:2] == [bos, bos] else ids

    def plain_text_ids(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Ids of a text that is no chat: BOS where the tokenizer begins texts with it, EOS at the end.

        special_tokens: read those that the text holds as such; BOS and EOS are then not written twice.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.encoder.ids(text if special_tokens else self._mark(text))
        start = [bos] if self.encoder.adds_bos and not (special_tokens and ids[:1] == [bos]) else []
        return [*start, *ids, *([] if special_tokens and ids[-1:] == [eos] else [eos])]

    def count(self, text: str) -> int:
        """Tokens of a text inside a chat."""
        return len(self.encoder.ids(text, "\n"))

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them, marked."""
        prepared = []
        for message in messages:
            of_answer = message["role"] == "assistant"
            marked = {
                key: value if key == "role" else self._mark(value, of_answer=of_answer)
                for key, value in message.items()
            }
            if "tool_calls" in marked and self._wants_text_arguments:
                marked["tool_calls"] = list(map(_with_text_arguments, marked["tool_calls"]))
            prepared.append(marked)
        return prepared

    def _mark(self, value: Any, *, of_answer: bool = False) -> Any:
        try:
            return self.encoder.mark(value, of_answer=of_answer)
        except MarkError as error:
            raise ChatTemplateError(str(error)) from error

    # --- what the template does ---

    def _find_probe(self) -> tuple[str, str, str]:
        """(an answer that the template can render, what it writes before it, what after it)."""
        user: list[Message] = [{"role": "user", "content": _PROBE_USER}]
        prompt = self.render(user, add_generation_prompt=True)
        for answer in (_PROBE_ANSWER, f"<think>\nThought 8T\n</think>\n\n{_PROBE_ANSWER}"):
            whole = self.render([*user, {"role": "assistant", "content": answer}])
            if whole.startswith(prompt) and _PROBE_ANSWER in whole[len(prompt) :]:
                before, _, after = whole[len(prompt) :].partition(_PROBE_ANSWER)
                return answer, before, after
        raise ChatTemplateError(
            "the chat template does not render an answer as a continuation of its prompt, so the two cannot be "
            "told apart: set model.chatTemplate"
        )

    def _end_tokens(self, end: str | None) -> list[int]:
        eos = self.tokenizer.eos_token_id
        found = [self.tokenizer.convert_tokens_to_ids(end)] if end is not None else []
        ids = list(dict.fromkeys([*found, *([eos] if eos is not None else [])]))
        if not ids:
            raise ChatTemplateError("neither the chat template nor the tokenizer defines a token that ends an answer")
        return ids

    def _has_prefix_property(self) -> bool:
        exchange = [{"role": "user", "content": _PROBE_USER}, {"role": "assistant", "content": self._probe}]
        chat = [*exchange, *exchange]
        try:
            prompt = self._render(chat[:1], add_generation_prompt=True)
            first = prompt + self._after(prompt, self._render(chat[:2]))
            return bool(self.end_text) and self._render(chat[:3], add_generation_prompt=True).startswith(first)
        except ChatTemplateError:
            return False

    def _takes_system(self) -> bool:
        chat = [
            {"role": "system", "content": "Sys 5S"},
            {"role": "user", "content": _PROBE_USER},
            {"role": "assistant", "content": self._probe},
        ]
        try:
            prompt, whole = self._render(chat[:2], add_generation_prompt=True), self._render(chat)
        except ChatTemplateError:
            return False
        return "Sys 5S" in prompt and whole.startswith(prompt)

    def _implicit_system(self) -> str:
        user: list[Message] = [{"role": "user", "content": _PROBE_USER}]
        before = self.render(user).partition(_PROBE_USER)[0]
        if not self.takes_system:
            return ""
        given = self.render([{"role": "system", "content": "Sys 5S"}, *user]).partition(_PROBE_USER)[0]
        head, _, tail = given.partition("Sys 5S")
        if before.startswith(head) and before.endswith(tail) and len(before) > len(head) + len(tail):
            return before[len(head) : len(before) - len(tail)].strip()
        return ""

    @cached_property
    def _wants_text_arguments(self) -> bool:
        """Whether the template joins the arguments of a tool call to its text, so that they have to be text."""
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"Key 1K": "Value 2V"}}}
        for as_text in (False, True):
            given = _with_text_arguments(call) if as_text else call
            asked = {"role": "user", "content": _PROBE_USER}
            try:
                text = self._render([asked, {"role": "assistant", "content": "", "tool_calls": [given]}])
            except ChatTemplateError:
                continue
            if "Key 1K" in text and "Value 2V" in text:
                return as_text
        return False


def _is_trimmed(content: str, answer: str) -> bool:
    return content[:1].isspace() and content.rstrip() not in answer


def split_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """(the system messages at the beginning, all others)."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return list(messages[:count]), list(messages[count:])


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}


def shortened(text: str) -> str:
    """The beginning of a text, for a sentence."""
    return text if len(text) <= 40 else f"{text[:40]}…"


def with_plain_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the plain one; says whether it had none."""
    if tokenizer.chat_template:
        return False
    bos = "{{ bos_token }}" if TextEncoder(tokenizer).adds_bos else ""
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ bos }}", bos)
    return True


@dataclass(frozen=True)
class PadChoice:
    """Which token pads, and why."""

    token: str
    why: str


def choose_pad(tokenizer: Any, end_token_ids: Sequence[int]) -> PadChoice | None:
    """A padding token that ends no answer, without adding one to the vocabulary; None where there is none.

    A tokenizer's own pad token is kept unless it also ends answers: a model padded with it never learns to stop.
    """
    forbidden = {*end_token_ids, tokenizer.bos_token_id}
    own = tokenizer.pad_token
    if own is not None and tokenizer.pad_token_id not in forbidden:
        return PadChoice(str(own), "the tokenizer's own pad token")
    reason = "the tokenizer's own pad token also ends answers" if own is not None else "the tokenizer has no pad token"
    template = tokenizer.chat_template or ""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    usable = [
        token for token in special if tokenizer.convert_tokens_to_ids(token) not in forbidden and token not in template
    ]
    for pattern, kind in (
        (r"pad", "a token named like a pad token"),
        (r"reserved|unused", "a reserved token"),
        (r"unk", "the unknown token"),
    ):
        found = next((token for token in usable if re.search(pattern, token, re.IGNORECASE)), None)
        if found is not None:
            return PadChoice(found, f"{reason}; {kind} is used")
    if usable:
        return PadChoice(usable[0], f"{reason}; a special token that the template does not use")
    # Byte 0xFF never occurs in UTF-8: in a byte-level vocabulary its symbol is free.
    if "ÿ" in tokenizer.get_vocab() and "Ġ" in tokenizer.get_vocab():
        return PadChoice("ÿ", f"{reason}; a byte that never occurs in text")
    return None
