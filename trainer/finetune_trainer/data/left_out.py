"""What a template leaves out of a chat: each part of it is tagged, and looked for in what the template writes.

A search for the parts themselves would find a dropped `0` in any other number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from finetune_trainer.data.messages import THOUGHT_MARKS, Message

_TAG = re.compile("\ufdd2(\\d+)\ufdd3")
_CLOSING = re.compile(r"</[\w:|]+>$")
"""Templates look at the ends of texts for it."""
_OPENING, _ENDING = ("|".join(map(re.escape, marks)) for marks in zip(*THOUGHT_MARKS, strict=True))
_THOUGHT = re.compile(rf"(\s*(?:{_OPENING})?)(.*)({_ENDING})(.*)", re.DOTALL)
_NEAR = 40
"""Characters between a key and its value at most."""
_PYTHON = {"true": "True", "false": "False", "null": "None"}


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a chat says."""

    message: int
    """Index of the message; -1 for the functions that may be called."""
    what: str
    text: str
    tag: int
    untagged: bool = False
    """A number or truth value: the tag is that of its key, behind which it stands."""


class Tagged:
    """A chat whose parts carry a tag at their end."""

    def __init__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        self.parts: list[Part] = []
        self.messages: list[Message] = []
        called: set[str] = set()
        for number, message in enumerate(messages):
            called |= {call["function"]["name"] for call in message.get("tool_calls", [])}
            self.messages.append(message | dict(self._message(number, message, called)))
        self.tools = [tool | {"function": self._function(tool["function"])} for tool in tools]

    def left_out(self, text: str) -> list[Part]:
        """The parts that are not in the text that was made of the tagged chat, or not whole."""
        plain, places = _without_tags(text)
        return [part for part in self.parts if not _stands(part, plain, places.get(part.tag))]

    def moved(self, text: str) -> tuple[Part, Part] | None:
        """A part, and one of an earlier message that stands behind it. (A system prompt may stand anywhere.)"""
        latest: Part | None = None
        for tag in _TAG.finditer(text):
            part = self.parts[int(tag[1])]
            if latest is not None and 0 < part.message < latest.message:
                return latest, part
            latest = part if latest is None or part.message > latest.message else latest
        return None

    def _message(self, number: int, message: Message, called: set[str]) -> Iterator[tuple[str, Any]]:
        thought = _THOUGHT.fullmatch(message["content"]) if message["role"] == "assistant" else None
        if thought:
            inner, after = self._end(thought[2], number, "thought"), self._end(thought[4], number, "content")
            yield "content", f"{thought[1]}{inner}{thought[3]}{after}"
        else:
            yield "content", self._end(message["content"], number, "content")
        if "reasoning_content" in message:
            yield "reasoning_content", self._end(message["reasoning_content"], number, "thought")
        if "name" in message and not (message["role"] == "tool" and message["name"] in called):
            yield "name", self._end(message["name"], number, "name")
        if "tool_calls" in message:
            yield "tool_calls", [self._call(call, number) for call in message["tool_calls"]]

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        function = call["function"]
        name = self._end(function["name"], number, "tool call")
        return call | {"function": function | {"name": name, "arguments": self._leaves(function["arguments"], number)}}

    def _leaves(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._end(value, number, "arguments of a tool call")
        if isinstance(value, list):
            return [self._leaves(item, number) for item in value]
        if isinstance(value, dict):
            return {
                self._end(key, number, "arguments of a tool call"): self._value(v, number) for key, v in value.items()
            }
        return value

    def _value(self, value: Any, number: int) -> Any:
        if isinstance(value, str | list | dict) or not self.parts:
            return self._leaves(value, number)
        self.parts.append(
            Part(number, "arguments of a tool call", json.dumps(value), self.parts[-1].tag, untagged=True)
        )
        return value

    def _function(self, function: dict[str, Any]) -> dict[str, Any]:
        tagged = function | {"name": self._end(function["name"], -1, "name of a function")}
        if isinstance(function.get("description"), str):
            tagged["description"] = self._end(function["description"], -1, "description of a function")
        return tagged

    def _end(self, text: str, number: int, what: str) -> str:
        """The text with a tag behind its last character that is no white space and in no closing tag."""
        stripped = text.rstrip()
        closing = _CLOSING.search(stripped)
        at = closing.start() if closing else len(stripped)
        if not text[:at].strip():
            return text
        tag = len(self.parts)
        self.parts.append(Part(number, what, text[:at].strip(), tag))
        return f"{text[:at]}\ufdd2{tag}\ufdd3{text[at:]}"


def _without_tags(text: str) -> tuple[str, dict[int, int]]:
    """(the text without tags, where in it the first of each stood)."""
    pieces = _TAG.split(text)
    ends = accumulate(map(len, pieces[::2]))
    return "".join(pieces[::2]), dict(reversed(list(zip(map(int, pieces[1::2]), ends, strict=False))))


def _stands(part: Part, text: str, place: int | None) -> bool:
    if place is None:
        return False
    if part.untagged:
        near = text[place : place + len(part.text) + _NEAR]
        return part.text in near or _PYTHON.get(part.text, part.text) in near
    escaped = json.dumps(part.text, ensure_ascii=False)[1:-1]
    if text.endswith(part.text, 0, place) or text.endswith(escaped, 0, place):
        return True
    # White space is the template's affair.
    before = text[max(place - 2 * len(part.text) - _NEAR, 0) : place]
    return "".join(before.split()).endswith("".join(part.text.split()))
