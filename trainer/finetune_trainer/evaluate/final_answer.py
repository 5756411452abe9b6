"""The answer in what a model generated: without its thoughts, and without what the chat template writes around it.

A thought is what stands between marks that the tokenizer or its template knows; the same marks in the data of a
model that does not know them are part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.messages import THOUGHT_MARKS

Thought = Literal["none", "finished", "unfinished"]


@dataclass(frozen=True)
class FinalAnswer:
    """A generated answer as it is scored."""

    text: str = ""
    thought: Thought = "none"
    """Whether the model thought before it answered; an unfinished thought leaves no answer."""


class AnswerReader:
    """Finds the answer in generated tokens; made once per tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.chat = chat = ChatFormat(tokenizer)
        before, after = chat.around_answer
        prompt, _ = chat.prompt([{"role": "user", "content": "Question"}])
        added = tokenizer.added_tokens_decoder
        known = " ".join([tokenizer.chat_template or "", *(token.content for token in added.values())])
        self._tokenizer = tokenizer
        self._special = {number: token.content for number, token in added.items() if token.special}
        self._marks = [pair for pair in THOUGHT_MARKS if pair[1] in known]
        self._opened = any(prompt.rstrip().endswith(opening) for opening, _ in self._marks)
        self._before = self.reference(before).strip()
        self._channel = next((mark for mark in self._special.values() if self._before.startswith(mark)), "")
        self._after = after.removesuffix(tokenizer.decode(chat.end_token_ids[:1])).strip()

    def read(self, ids: Sequence[int], *, ended: bool) -> FinalAnswer:
        """The answer among generated token ids. ended: whether an end token followed them."""
        answer = self._answer(self._tokenizer.decode(ids), ended)
        text = answer.text
        for number in self._special.keys() & set(ids):
            text = text.replace(self._special[number], "")
        return FinalAnswer(text.strip().removesuffix(self._after).strip(), answer.thought)

    def reference(self, text: str) -> str:
        """An answer of the data as it is compared: without the thoughts that stand before it."""
        parts = self._split(text, opened=False)
        return text if parts is None else parts[1].strip()

    def first_tokens(self, text: str, count: int) -> str:
        """The text as far as that many tokens reach."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= count else str(self._tokenizer.decode(ids[:count])).strip()

    def _answer(self, text: str, ended: bool) -> FinalAnswer:
        parts = self._split(text, opened=self._opened)
        if parts is None:
            # A prompt that opens a thought does not make the model think.
            return FinalAnswer(text) if self._opened and ended else FinalAnswer(thought="unfinished")
        thought: Thought = "finished" if parts[0].strip() else "none"
        rest = parts[1].lstrip()
        if rest.startswith(self._before):
            return FinalAnswer(rest.removeprefix(self._before), thought)
        if not self._channel or not rest.startswith(self._channel):
            return FinalAnswer(rest, thought)
        _, answers, final = rest.partition(self._before)
        return FinalAnswer(final, "finished") if answers else FinalAnswer(thought="unfinished")

    def _split(self, text: str, *, opened: bool) -> tuple[str, str] | None:
        """(thought, what follows it), None where the thought does not end. opened: whether the prompt began one."""
        for opening, closing in self._marks:
            thought, closed, rest = text.partition(closing)
            if closed:
                return thought.lstrip().removeprefix(opening), rest
            if text.lstrip().startswith(opening):
                return None
        return None if opened else ("", text)
