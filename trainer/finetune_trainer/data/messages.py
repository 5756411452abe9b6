"""Chats as datasets hold them become messages of one form: what a message says is kept, or the row is refused. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role`, `content` (text), and where there are such: `reasoning_content`, `tool_calls`, `tool_call_id`, `name`."""

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer", "client"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "agent"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("tool_result", "function_result"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""Names of roles as data has them. A `call` is an assistant turn whose content is a tool call in JSON."""

ROLE_KEYS = ("role", "from", "sender", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "message")
TRAINED_KEYS = ("weight", "train", "training", "loss")
"""A flag per message: OpenAI's name for it, and those of other trainers."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
METADATA_KEYS = frozenset(("id", "timestamp", "created_at", "index"))
"""What names a message or dates it, and no template writes. Rows that have it are counted in the notes."""
MOST_NESTED = 50
"""Levels of objects in a tool call or a function."""
MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")

UNUSED_METADATA = f"message fields that no template writes are not used ({', '.join(sorted(METADATA_KEYS))})"
LEFT_OUT_END = "messages after the last answer are left out"


THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
"""Around a thought at the beginning of an answer."""


class BadRowError(ValueError):
    """Why a row cannot be used, in a few words."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that holds at least one answer, and ends with one."""

    messages: list[Message]
    trained: list[bool]
    """Whether the row wants the message trained on: as good as all answers, but for a `weight` of 0."""
    tools: list[dict[str, Any]]
    """OpenAI's form: `{type: function, function: {name, description, parameters}}`."""
    notes: frozenset[str] = frozenset()
    """What of the row is not used, each in a few words."""

    @property
    def text(self) -> str:
        """What is said, without system prompts."""
        spoken = [message for message in self.messages if message["role"] != "system"]
        return "\n".join("\n".join(_words(message)) for message in spoken)


def _words(message: Message) -> list[str]:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return [*filter(None, [message.get("reasoning_content")]), message["content"], *calls]


def from_json_text(value: Any) -> Any:
    """A list or object that a CSV holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}" and value:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def read_chat(value: Any, *, tools: Any = None, system: Any = None) -> Chat:
    """The chat of a row: `value` holds its turns, columns of their own the functions and the system prompt.

    Accepts `{role, content}`, ShareGPT's `{from, value}`, `{text, sender}` of two people, plain texts in turn, lists
    of these per turn, and columns of lists. Without roles, who speaks first is the user, and several messages of one
    person in a row become one turn. Raises BadRowError where something cannot be used.
    """
    turns = [_turn(part, number) for number, part in _parts(value)]
    return _chat(_with_roles(turns), tools, system)


def read_prompt_and_completion(prompt: Any, completion: Any, *, tools: Any = None, system: Any = None) -> Chat:
    """The chat of a row whose prompt and completion are texts or lists of messages. Only the completion is trained.

    Raises BadRowError where something cannot be used.
    """
    given = _with_roles([_turn(part, 0) for _, part in _parts(_as_turns(prompt, "user"))])
    answers = _with_roles([_turn(part, 0) for _, part in _parts(_as_turns(completion, "assistant"))])
    if not all(turn.role in ("assistant", "tool") for turn in answers):
        raise BadRowError("completion holds messages that are neither answers nor tool results")
    for turn in given:
        turn.wanted = False
    return _chat([*given, *answers], tools, system)


def without_empty_keys(value: Any) -> Any:
    """The value without keys that are null: a tool call would be trained with the arguments of all other functions."""
    if isinstance(value, dict):
        return {key: without_empty_keys(item) for key, item in value.items() if item is not None}
    return list(map(without_empty_keys, value)) if isinstance(value, list) else value


def refuse_media(fields: Mapping[str, Any]) -> None:
    """Raise BadRowError for a row with images, video or sound beside its chat."""
    for name in MEDIA_COLUMNS:
        value = fields.get(name)
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            raise BadRowError(f"column {name} holds what is not text: models are trained on text only")


@dataclass(slots=True)
class _Turn:
    """A message as it was read. `role` is the speaker's name until `_with_roles`."""

    role: str
    content: str
    extra: dict[str, Any]
    """What goes into the message besides."""
    wanted: bool | None = None
    """Whether the row says that it is to be trained on, or not."""
    tools: Any = None
    metadata: bool = False


def _as_turns(value: Any, role: str) -> Any:
    value = from_json_text(value)
    return [{"role": role, "content": value}] if isinstance(value, str) and value.strip() else value


def _parts(value: Any) -> list[tuple[int, Any]]:
    """(number of the turn, message) of each message."""
    value = from_json_text(value)
    if isinstance(value, dict):
        lists = {key: column for key, column in value.items() if isinstance(column, list)}
        if not lists or len(lists) < len(_present(value)):
            raise BadRowError("messages is not a list")
        if len({len(column) for column in lists.values()}) > 1:
            raise BadRowError("the lists of messages have different lengths")
        value = [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise BadRowError("messages is not a list" if value else "messages is empty")
    return [
        (turn, part) for turn, entry in enumerate(value) for part in (entry if isinstance(entry, list) else [entry])
    ]


def _present(part: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say something: Arrow gives every message the keys of all."""
    return {str(key): value for key, value in part.items() if value is not None and value not in ("", [], {})}


def _turn(part: Any, number: int) -> _Turn:
    """One message, nothing of it left out. Raises BadRowError for a key that cannot be used."""
    if isinstance(part, str):
        return _Turn(f"turn {number % 2}", part, {})
    if not isinstance(part, dict):
        raise BadRowError("a message is neither text nor an object")
    left = _present(part)
    role_key = next((key for key in ROLE_KEYS if key in left), None)
    speaker = left.pop(role_key) if role_key else None
    if not isinstance(speaker, str | int):
        raise BadRowError("a message has no role" if speaker is None else f"{role_key} of a message is not text")
    content_key = next((key for key in CONTENT_KEYS if part.get(key) is not None), None)
    value = left.pop(content_key, "") if content_key else None
    turn = _Turn(str(speaker).strip().lower(), "", {})
    turn.content, thought = _content(value, ROLES.get(_folded(turn.role)) == "tool")
    _read_extra(turn, left, thought)
    turn.metadata = any(left.pop(key, None) is not None for key in METADATA_KEYS)
    if left:
        raise BadRowError(f"a message has {sorted(left)[0]!r}, which is not known and would be left out")
    if content_key is None and not turn.extra and ROLES.get(_folded(turn.role)) not in ("tool", "system"):
        raise BadRowError("a message has no content")
    return turn


def _read_extra(turn: _Turn, left: dict[str, Any], thought: str) -> None:
    """Take what is known out of `left`."""
    thoughts = [thought, *(str(left.pop(key)) for key in REASONING_KEYS if key in left)]
    thoughts = list(dict.fromkeys(filter(None, thoughts)))
    if len(thoughts) > 1:
        raise BadRowError("a message has two different thoughts (reasoning_content, reasoning, thinking)")
    if thoughts:
        turn.extra["reasoning_content"] = thoughts[0]
    calls = [*_list(left.pop("tool_calls", [])), *([left.pop("function_call")] if "function_call" in left else [])]
    if calls:
        turn.extra["tool_calls"] = [_tool_call(call) for call in calls]
    for key in ("name", "tool_call_id"):
        if key in left:
            turn.extra[key] = str(left.pop(key))
    turn.tools = left.pop("tools", None)
    wanted = [(key, left.pop(key)) for key in TRAINED_KEYS if key in left]
    for key, value in wanted:
        if value not in (0, 1):
            raise BadRowError(f"{key} {value!r} of a message is neither 0 nor 1")
    if wanted:
        turn.wanted = all(bool(value) for _, value in wanted)


def _content(value: Any, of_tool: bool) -> tuple[str, str]:
    """(text, thought) of a message's content: a text, a list of parts, or for tools any JSON."""
    if isinstance(value, str) or value is None:
        return value or "", ""
    _refuse_deep(value, "the content of a message is")
    if of_tool and not (isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)):
        return json.dumps(value, ensure_ascii=False, default=str), ""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise BadRowError("the content of a message is an object, not text")
        return str(value), ""
    parts = [_part(part) for part in value]
    return "".join(text for kind, text in parts if kind == "text"), "".join(t for kind, t in parts if kind != "text")


def _part(part: Any) -> tuple[str, str]:
    if isinstance(part, str):
        return "text", part
    left = _present(part) if isinstance(part, dict) else {}
    kind = str(left.pop("type", "text"))
    if kind not in ("text", "thinking"):
        raise BadRowError(f"a message holds a part of type {kind!r}: models are trained on text only")
    text = left.pop(kind, "")
    if not isinstance(part, dict) or left or not isinstance(text, str):
        what = f"has {sorted(left)[0]!r}, which is not known" if left else "is not text"
        raise BadRowError(f"a part of a message {what}")
    return kind, text


def _refuse_deep(value: Any, what: str) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for item in level
            if isinstance(item, list | dict)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    if level:
        raise BadRowError(f"{what} more than {MOST_NESTED} levels deep")


def _list(value: Any) -> list[Any]:
    value = from_json_text(value)
    return value if isinstance(value, list) else [value]


def _tool_call(call: Any) -> dict[str, Any]:
    """A call as `{type: function, function: {name, arguments: object}}`, with its id if it has one."""
    call = _present(call) if isinstance(call := from_json_text(call), dict) else {}
    function = call.pop("function", None)
    if function is None:
        function = {key: call.pop(key) for key in ("name", "arguments", "parameters") if key in call}
    function = _present(function) if isinstance(function, dict) else {}
    name = function.pop("name", None)
    arguments = from_json_text(function.pop("arguments", function.pop("parameters", {})))
    identity, kind = call.pop("id", None), call.pop("type", "function")
    call.pop("index", None)  # its place in the list
    if not isinstance(name, str) or kind != "function":
        raise BadRowError("a tool call names no function" if kind == "function" else f"a tool call of type {kind!r}")
    if left := {**call, **function}:
        raise BadRowError(f"a tool call has {sorted(left)[0]!r}, which is not known and would be left out")
    if not isinstance(arguments, dict):
        raise BadRowError(f"the arguments of the tool call {name!r} are not a JSON object")
    _refuse_deep(arguments, f"the arguments of the tool call {name!r} are")
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | (
        {"id": str(identity)} if identity is not None else {}
    )


def _tools(value: Any) -> list[dict[str, Any]]:
    """Functions in OpenAI's form, from that or from bare `{name, description, parameters}`, as JSON or text."""
    tools = []
    for entry in [] if value is None or value in ("", [], {}) else _list(value):
        tool = from_json_text(entry)
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError("tools holds something that is no function with a name")
        _refuse_deep(tool, f"the function {function['name']!r} is described")
        tools.append(tool if "function" in tool else {"type": "function", "function": function})
    return tools


def _folded(speaker: str) -> str:
    return speaker.replace("-", "_").replace(" ", "_")


def _with_roles(turns: list[_Turn]) -> list[_Turn]:
    """The turns with known roles. Raises BadRowError for an unknown name beside known ones, or for three speakers."""
    unknown = [turn.role for turn in turns if _folded(turn.role) not in ROLES]
    if len(unknown) == len(turns):
        return _by_speaker(turns)
    if unknown:
        known = list(dict.fromkeys(turn.role for turn in turns if turn.role not in unknown))
        raise BadRowError(
            f"the role {unknown[0][:40]!r} is not known, and stands beside {', '.join(known)}. Known are "
            f"{', '.join(role for role in ROLES)}"
        )
    for turn in turns:
        turn.role = ROLES[_folded(turn.role)]
        if turn.role == "call":
            turn.role = "assistant"
            turn.extra.setdefault("tool_calls", []).extend(map(_tool_call, _list(turn.content)))
            turn.content = ""
    return turns


def _by_speaker(turns: Sequence[_Turn]) -> list[_Turn]:
    turns = [turn for turn in turns if turn.content.strip() or turn.extra]
    speakers = list(dict.fromkeys(turn.role for turn in turns))
    if len(speakers) > 2:
        names = ", ".join(speaker[:20] for speaker in speakers[:4])
        raise BadRowError(f"{len(speakers)} speakers ({names}), none of them called user or assistant")
    merged: list[_Turn] = []
    for turn in turns:
        turn.role = "user" if turn.role == speakers[0] else "assistant"
        before = merged[-1] if merged else None
        if before and (before.role, before.extra, before.wanted) == (turn.role, turn.extra, turn.wanted):
            before.content += "\n" + turn.content
        else:
            merged.append(turn)
    return merged


def _chat(turns: list[_Turn], tools: Any, system: Any) -> Chat:
    """The chat of turns with roles. Raises BadRowError where nothing can be trained on, or a wish cannot be met."""
    notes = {UNUSED_METADATA} if any(turn.metadata for turn in turns) else set()
    if any(turn.tools is not None for turn in turns[1:]):
        raise BadRowError("tools stand in a message that is not the first")
    if turns and turns[0].tools is not None:
        tools = [*_tools(tools), *(tool for tool in _tools(turns[0].tools) if tool not in _tools(tools))]
    if not isinstance(system, str | None):
        raise BadRowError("the system prompt is not text")
    if system and system.strip() and not _begins_with(turns, system):
        turns = [_Turn("system", system, {}), *turns]
    end = max((i for i, turn in enumerate(turns, start=1) if turn.role == "assistant"), default=0)
    if end < len(turns):
        notes.add(LEFT_OUT_END)
    turns = turns[:end]
    _check(turns)
    messages = [{"role": turn.role, "content": turn.content, **turn.extra} for turn in turns]
    trained = [turn.role == "assistant" and turn.wanted is not False for turn in turns]
    return Chat(_in_order_of_calls(messages), trained, _tools(tools), frozenset(notes))


def _begins_with(turns: Sequence[_Turn], system: str) -> bool:
    return bool(turns) and turns[0].role == "system" and turns[0].content.strip() == system.strip()


def _check(turns: Sequence[_Turn]) -> None:
    if not turns:
        raise BadRowError("no assistant turn")
    answers = [turn for turn in turns[1:] if turn.role == "assistant"]
    if not answers:
        raise BadRowError("nothing before the first assistant turn")
    if any(not turn.content.strip() and "tool_calls" not in turn.extra for turn in turns if turn.role == "assistant"):
        raise BadRowError("an assistant turn is empty")
    if all(turn.wanted is False for turn in answers):
        raise BadRowError("no answer is to be trained on (weight or train)")
    for turn in turns:
        if turn.role != "assistant":
            if turn.wanted:
                raise BadRowError(f"a {turn.role} message asks to be trained on (weight or train): only answers can be")
            if "tool_calls" in turn.extra or "reasoning_content" in turn.extra:
                raise BadRowError(f"a {turn.role} message holds tool calls or thoughts: only answers can")
        elif "tool_call_id" in turn.extra:
            raise BadRowError("an assistant message has a tool_call_id: only tool results can")


def _in_order_of_calls(messages: list[Message]) -> list[Message]:
    """Results of parallel calls in the order of the calls: few templates write the ids by which they are matched."""
    if not any("tool_calls" in message for message in messages):
        return messages
    ordered: list[Message] = []
    order: dict[str, int] = {}
    for message in messages:
        if message["role"] == "tool":
            identity = message.get("tool_call_id")
            if identity is not None and order and identity not in order:
                raise BadRowError(f"a tool result names the call {identity!r}, which the answer before does not make")
        elif message["role"] == "assistant":
            calls = message.get("tool_calls", [])
            order = {call["id"]: number for number, call in enumerate(calls) if "id" in call}
        ordered.append(message)
        begin = next((i for i in range(len(ordered), 0, -1) if ordered[i - 1]["role"] != "tool"), 0)
        results = ordered[begin:]
        if order and all(result.get("tool_call_id") in order for result in results):
            ordered[begin:] = sorted(results, key=lambda result: order[result["tool_call_id"]])
    return ordered
