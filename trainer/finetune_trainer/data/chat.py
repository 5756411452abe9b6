"""How a conversation becomes tokens: the same for training, validation, evaluation and `finetune preview`.

A chat is rendered by the tokenizer's own template and cut into segments: context, and what the loss is computed on
(an assistant turn with the token that ends it), found by prefix difference of rendered messages. Segments are tokenised
one by one, so a prompt has the same tokens whether an answer follows or is still to be generated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError

from finetune_trainer.data.chat_turns import TemplateSkeleton, answer_turns, template_skeleton
from finetune_trainer.data.limits import within_limits

Message = dict[str, str]

PLAIN_TEMPLATE = (
    "{{ bos }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Template of a base model that has none; `{{ bos }}` is written in where the tokenizer begins texts with BOS."""

# Two private-use characters around a control token that stands in the data: it is then tokenised as plain text.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_PROBE_USER, _PROBE_ANSWER = "Question 7Q", "Answer 9Z"


class ChatTemplateError(ValueError):
    """The template cannot render these messages; the message says why, in the template's words where it has any."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered chat and whether the loss is computed on it."""

    text: str
    trainable: bool


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
        self._backend = _plain_backend(tokenizer)
        self._skeleton = lru_cache(maxsize=1000)(self._find_skeleton)
        self._control_tokens = _control_token_pattern(tokenizer)
        self._anchor = _anchor(tokenizer)
        self.adds_bos = _adds_bos(tokenizer)
        user: list[Message] = [{"role": "user", "content": _PROBE_USER}]
        prompt = self.render(user, add_generation_prompt=True)
        whole = self.render([*user, {"role": "assistant", "content": _PROBE_ANSWER}])
        if not whole.startswith(prompt) or _PROBE_ANSWER not in whole[len(prompt) :]:
            raise ChatTemplateError(
                "the chat template does not render an answer as a continuation of its prompt, so the two cannot be "
                "told apart: set model.chatTemplate"
            )
        suffix = whole[len(prompt) :].partition(_PROBE_ANSWER)[2]
        special = self._control_tokens.search(suffix) if self._control_tokens else None
        self.end_text: str = suffix[: special.end()] if special else ""
        """What follows an answer up to its end token, as text; empty where the template writes no such token."""
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
        """The template's text for the messages; control tokens in their contents are marked as plain text."""
        return self._render(self._marked(messages), add_generation_prompt=add_generation_prompt)

    def _render(self, marked: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = within_limits(
                lambda: self.tokenizer.apply_chat_template(
                    marked, tokenize=False, add_generation_prompt=add_generation_prompt
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
        """The messages after a system prompt, which joins the row's own, or the first turn if there is no place."""
        given = [message for message in messages if message["role"] == "system"]
        turns = [dict(message) for message in messages if message["role"] != "system"]
        whole = "\n\n".join(filter(None, [system, *(message["content"] for message in given)]))
        if not whole:
            return turns
        if self.takes_system:
            return [{"role": "system", "content": whole}, *turns]
        return [turns[0] | {"content": f"{whole}\n\n{turns[0]['content']}"}, *turns[1:]] if turns else turns

    @staticmethod
    def shown(text: str) -> str:
        """Rendered text without the marks of `render`."""
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def segments(self, messages: Sequence[Message], loss_on: Literal["all", "last"] = "all") -> list[list[Segment]]:
        """Documents of a chat that ends with an assistant turn, each a list of segments ending with a trainable one.

        One document, or one for each trainable turn where the template rewrites earlier turns.
        Raises ChatTemplateError where the template refuses the messages.
        """
        messages = self._marked(messages)
        turns = answer_turns([message["role"] for message in messages])
        if not self.keeps_history:
            chosen = turns if loss_on == "all" else turns[-1:]
            return [self._last_turn(messages[: turn + 1]) for turn in chosen]
        begun = self._beginnings(messages)
        pieces: list[Segment] = []
        done = ""
        for turn in turns:
            prompt = begun(turn, True)
            if not prompt.startswith(done):
                return [self._last_turn(messages[: turn + 1]) for turn in (turns if loss_on == "all" else turns[-1:])]
            answer = self._after(prompt, begun(turn + 1, False))
            pieces += [Segment(prompt[len(done) :], False), Segment(answer, loss_on == "all" or turn == turns[-1])]
            done = prompt + answer
        return [pieces]

    def _beginnings(self, marked: Sequence[Message]) -> Callable[[int, bool], str]:
        """(how many messages, whether an answer is asked for) -> the template's text for so many first messages.

        Up to an assistant turn that answers, asked for, and with it, not asked for.
        """

        def rendered(count: int, ask: bool) -> str:
            return self._render(marked[:count], add_generation_prompt=ask)

        skeleton = self._skeleton(tuple(message["role"] for message in marked))
        if skeleton is None:
            return rendered
        try:
            whole = rendered(len(marked), False)
        except ChatTemplateError:
            return rendered  # which says so where it matters
        ends = skeleton.ends(whole, [message["content"] for message in marked])
        if ends is None:
            return rendered
        return lambda count, ask: whole[: ends[count - 1] + skeleton.suffix_lengths[count, ask]]

    def _find_skeleton(self, roles: tuple[str, ...]) -> TemplateSkeleton | None:
        try:
            return template_skeleton(lambda messages, ask: self._render(messages, add_generation_prompt=ask), roles)
        except ChatTemplateError:
            return None

    def _last_turn(self, marked: Sequence[Message]) -> list[Segment]:
        prompt = self._render(marked[:-1], add_generation_prompt=True)
        return [Segment(prompt, False), Segment(self._answer(prompt, marked), True)]

    def _answer(self, prompt: str, marked: Sequence[Message]) -> str:
        """The last turn's text with its end token."""
        return self._after(prompt, self._render(marked))

    def _after(self, prompt: str, whole: str) -> str:
        if not whole.startswith(prompt) or not whole.endswith(self._after_end):
            raise ChatTemplateError("the chat template does not render this answer as a continuation of its prompt")
        return whole[len(prompt) : len(whole) - len(self._after_end)]

    # --- tokens ---

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """(text, ids) of what the model sees before it answers."""
        text = self.render(messages, add_generation_prompt=True)
        return self.shown(text), self.encode([Segment(text, False)])[0]

    def answer_ids(self, answer: str) -> list[int]:
        """Tokens of an answer with its end token, as they follow any prompt."""
        return list(self._answer_ids(answer))

    def _compute_answer_ids(self, answer: str) -> tuple[int, ...]:
        turns = [{"role": "user", "content": _PROBE_USER}, {"role": "assistant", "content": answer}]
        segments = self._last_turn(self._marked(turns))
        ids = self.encode([segments[1]], inside=True)[0]
        return tuple(ids if self.end_text else [*ids, self.end_token_ids[0]])

    def tokens(self, segments: Sequence[Segment]) -> LabelledTokens:
        """Tokenise a document of `segments`."""
        pieces = self.encode(segments)
        if not self.end_text:
            pieces[-1] = [*pieces[-1], self.end_token_ids[0]]
        return LabelledTokens.of([(ids, segment.trainable) for ids, segment in zip(pieces, segments, strict=True)])

    def encode(self, segments: Sequence[Segment], *, inside: bool = False) -> list[list[int]]:
        """Ids of each segment; all but the first (or all, with `inside`) continue a text that has begun.

        A begin-of-text token is written by the template or not at all, and never twice.
        """
        encoded = [
            self._encode_text(segment.text, begun=inside or number > 0) for number, segment in enumerate(segments)
        ]
        bos = self.tokenizer.bos_token_id
        if not inside and encoded and self.adds_bos and encoded[0][:2] == [bos, bos]:
            encoded[0] = encoded[0][1:]
        return encoded

    def plain_text_ids(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Ids of a text that is no chat: BOS where the tokenizer begins texts with it, EOS at the end.

        special_tokens: read those that the text holds as such; BOS and EOS are then not written twice.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self._encode_text(text if special_tokens else self._mark(text), begun=False)
        start = [bos] if self.adds_bos and not (special_tokens and ids[:1] == [bos]) else []
        return [*start, *ids, *([] if special_tokens and ids[-1:] == [eos] else [eos])]

    def _encode_text(self, text: str, *, begun: bool) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(_MARKED.split(text)):
            if part:
                ids += self._encode_part(part, begun=begun or bool(ids), as_plain=number % 2 == 1)
        return ids

    def _encode_part(self, text: str, *, begun: bool, as_plain: bool) -> list[int]:
        anchored = begun and self._anchor and not as_plain
        given = f"{self._anchor}{text}" if anchored else text
        ids = self._ids(given, as_plain)
        return ids[1:] if anchored else ids

    def _ids(self, text: str, as_plain: bool) -> list[int]:
        if self._backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=as_plain))
        if self._backend.encode_special_tokens != as_plain:
            self._backend.encode_special_tokens = as_plain
        # "Fast" only in that it keeps no offsets.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        return [message | {"content": self._mark(message["content"])} for message in messages]

    def _mark(self, content: str) -> str:
        if self._control_tokens is None or not self._control_tokens.search(content):
            return content
        return self._control_tokens.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", content)

    # --- what the template does ---

    def _end_tokens(self, end: str | None) -> list[int]:
        eos = self.tokenizer.eos_token_id
        found = [self.tokenizer.convert_tokens_to_ids(end)] if end is not None else []
        ids = list(dict.fromkeys([*found, *([eos] if eos is not None else [])]))
        if not ids:
            raise ChatTemplateError("neither the chat template nor the tokenizer defines a token that ends an answer")
        return ids

    def _has_prefix_property(self) -> bool:
        exchange = [{"role": "user", "content": _PROBE_USER}, {"role": "assistant", "content": _PROBE_ANSWER}]
        marked = self._marked([*exchange, *exchange])
        try:
            prompt = self._render(marked[:1], add_generation_prompt=True)
            first = prompt + self._answer(prompt, marked[:2])
            return bool(self.end_text) and self._render(marked[:3], add_generation_prompt=True).startswith(first)
        except ChatTemplateError:
            return False

    def _takes_system(self) -> bool:
        try:
            text = self.render([{"role": "system", "content": "Sys 5S"}, {"role": "user", "content": _PROBE_USER}])
        except ChatTemplateError:
            return False
        return "Sys 5S" in text

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


def _plain_backend(tokenizer: Any) -> Any | None:
    """The library that a tokenizer's `encode` only wraps, at several times the cost; None where it does more."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    wraps = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.encode is PreTrainedTokenizerBase.encode
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    if not wraps:
        return None
    tokenizer.encode("x")  # takes away the truncation and padding that a tokenizer's file may ask for
    return tokenizer.backend_tokenizer


def _control_token_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.content.isspace() and token.content in (tokenizer.chat_template or "")
    }
    if not tokens:
        return None
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer.encode("x"))[:1] == [bos]


def _anchor(tokenizer: Any) -> str:
    """A special token to put before a continued text, where the tokenizer treats a text's beginning specially."""
    for token in tokenizer.added_tokens_decoder.values():
        if not token.special or token.lstrip or token.rstrip:
            continue
        alone = tokenizer.encode("x y", add_special_tokens=False)
        after = tokenizer.encode(f"{token.content}x y", add_special_tokens=False)
        return "" if list(after[1:]) == list(alone) else str(token.content)
    return ""


def with_plain_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the plain one; says whether it had none."""
    if tokenizer.chat_template:
        return False
    bos = "{{ bos_token }}" if _adds_bos(tokenizer) else ""
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
