"""Chats as datasets hold them become messages of one form: who says what. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, str]

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}


class BadRowError(ValueError):
    """Why a row cannot be used, in a few words."""


def from_json_text(value: Any) -> Any:
    """A list or object that a CSV holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}" and value:
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def read_messages(value: Any) -> list[Message]:
    """Turns as `{role, content}`, ending with the last assistant turn.

    Accepts `{role, content}`, ShareGPT's `{from, value}`, `{text, sender}` of two people, plain texts in turn, lists
    of these a turn, and columns of lists. Without roles, who speaks first is the user, and several messages of one
    person in a row become one turn.
    """
    value = from_json_text(value)
    if isinstance(value, dict):
        lists = {key: column for key, column in value.items() if isinstance(column, list)}
        if not lists:
            raise BadRowError("messages is not a list")
        value = [dict(zip(lists, turn, strict=False)) for turn in zip(*lists.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise BadRowError("messages is empty" if not value else "messages is not a list")
    flat = [
        (part, turn) for turn, entry in enumerate(value) for part in (entry if isinstance(entry, list) else [entry])
    ]
    turns = [_speaker_and_text(part, turn) for part, turn in flat]
    messages = _with_roles(turns) if all(role in ROLES for role, _ in turns) else _by_speaker(turns)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise BadRowError("no assistant turn" if not messages else "nothing before the first assistant turn")
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise BadRowError("an assistant turn is empty")
    return messages


def _speaker_and_text(part: Any, turn: int) -> tuple[str, str]:
    if isinstance(part, str):
        return f"turn {turn % 2}", part
    if not isinstance(part, dict):
        raise BadRowError("a message is neither text nor an object")
    content = next((part[key] for key in ("content", "value", "text", "message") if part.get(key) is not None), None)
    speaker = next((part[key] for key in ("role", "from", "sender", "speaker", "author") if part.get(key)), None)
    if isinstance(content, list):
        content = "".join(str(piece.get("text", "")) for piece in content if isinstance(piece, dict))
    if content is None or speaker is None:
        raise BadRowError("a message has no content" if content is None else "a message has no role")
    return str(speaker).strip().lower(), str(content)


def _with_roles(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": ROLES[role], "content": content} for role, content in turns]


def _by_speaker(turns: Sequence[tuple[str, str]]) -> list[Message]:
    turns = [(speaker, content) for speaker, content in turns if content.strip()]
    speakers = list(dict.fromkeys(speaker for speaker, _ in turns))
    if len(speakers) > 2:
        raise BadRowError(f"{len(speakers)} speakers, none of them called user or assistant")
    messages: list[Message] = []
    for speaker, content in turns:
        role = "user" if speaker == speakers[0] else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages
