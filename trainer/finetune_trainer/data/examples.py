"""From a raw row to an example of its task: labels, choices, answers and turns in one form. Pure.

A row that cannot become an example raises `BadRowError` with the reason; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.traits import Task
from finetune_trainer.data.messages import BadRowError, Message, from_json_text, read_messages

Found = Mapping[str, str | tuple[str, ...]]

UNANSWERABLE = "unanswerable"
"""What the model learns to say where the context holds no answer."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row, understood. Which fields are set depends on the task."""

    row: int
    """Number in the split, from 1."""
    variables: dict[str, Any]
    """What templates see: the row's columns, and above them the roles (`text`, `question`, `choices`, …)."""
    text: str
    """The raw input without prompt: for near-duplicates and the TF-IDF baselines."""
    answer: str = ""
    """What the model has to answer: the label, the right choice, the first answer, the summary."""
    answers: list[str] = field(default_factory=list)
    """Everything that counts as right."""
    candidates: list[str] | None = None
    """Closed choices of this row."""
    gold: int | None = None
    """Index of the right one."""
    messages: list[Message] | None = None


def read_example(
    task: Task, row: int, fields: Mapping[str, Any], found: Found, class_names: Mapping[str, list[str]]
) -> Example:
    """The example of one row. found: role to column; class_names: names of integer labels by column."""
    return _READ[task](row, fields, found, class_names)


def _classification(row: int, fields: Mapping[str, Any], found: Found, names: Mapping[str, list[str]]) -> Example:
    column = str(found["label"])
    label = _label(fields.get(column), names.get(column))
    text = _text(fields, found, "text") if "text" in found else _all_text(fields, without=column)
    variables = {**fields, "text": text, "label": label, column: label}
    return Example(row, variables, text, label, [label])


def _multiple_choice(row: int, fields: Mapping[str, Any], found: Found, names: Mapping[str, list[str]]) -> Example:
    letters, choices = _choices(fields, found["choices"])
    gold = _gold(fields.get(str(found["answer"])), letters, choices)
    if [choice.casefold() for choice in choices].count(choices[gold].casefold()) > 1:
        raise BadRowError("the right choice occurs twice")
    question = _text(fields, found, "question") if "question" in found else ""
    context = _optional_text(fields, found, "context")
    variables = {**fields, "question": question, "context": context, "choices": choices, "answer": choices[gold]}
    text = " ".join(filter(None, (context, question or _all_text(fields), *choices)))
    return Example(row, variables, text, choices[gold], [choices[gold]], choices, gold)


def _question_answering(row: int, fields: Mapping[str, Any], found: Found, names: Mapping[str, list[str]]) -> Example:
    answers = _answers(fields.get(str(found["answer"])))
    question = _text(fields, found, "question") if "question" in found else ""
    context = _optional_text(fields, found, "context")
    if not answers and not context and "context" in found:
        raise BadRowError("neither an answer nor a context")
    if not answers and "context" not in found:
        raise BadRowError("the answer is empty")
    answers = answers or [UNANSWERABLE]
    variables = {**fields, "question": question, "context": context, "answer": answers[0]}
    return Example(row, variables, " ".join(filter(None, (question, context))), answers[0], answers)


def _summarization(row: int, fields: Mapping[str, Any], found: Found, names: Mapping[str, list[str]]) -> Example:
    document = _text(fields, found, "document") if "document" in found else _all_text(fields)
    summary = _text(fields, found, "summary")
    variables = {**fields, "document": document, "summary": summary, "answer": summary}
    return Example(row, variables, document, summary, [summary])


def _plain_text(row: int, fields: Mapping[str, Any], found: Found, names: Mapping[str, list[str]]) -> Example:
    text = _text(fields, found, "text", strip=False) if "text" in found else _all_text(fields)
    return Example(row, {**fields, "text": text}, text)


def _chat(row: int, fields: Mapping[str, Any], found: Found, names: Mapping[str, list[str]]) -> Example:
    messages = read_messages(fields.get(str(found["messages"])))
    text = "\n".join(message["content"] for message in messages if message["role"] != "system")
    return Example(row, {**fields, "messages": messages}, text, messages=messages)


_READ: dict[Task, Callable[[int, Mapping[str, Any], Found, Mapping[str, list[str]]], Example]] = {
    Task.CLASSIFICATION: _classification,
    Task.MULTIPLE_CHOICE: _multiple_choice,
    Task.QUESTION_ANSWERING: _question_answering,
    Task.SUMMARIZATION: _summarization,
    Task.TEXT: _plain_text,
    Task.CHAT: _chat,
}


def _text(fields: Mapping[str, Any], found: Found, role: str, *, strip: bool = True) -> str:
    value = fields.get(str(found[role]))
    if value is None:
        raise BadRowError(f"{role} is empty")
    text = value if isinstance(value, str) else str(value)
    if not text.strip():
        raise BadRowError(f"{role} is empty")
    return text.strip() if strip else text


def _optional_text(fields: Mapping[str, Any], found: Found, role: str) -> str:
    value = fields.get(str(found[role])) if role in found else None
    return "" if value is None else str(value).strip()


def _all_text(fields: Mapping[str, Any], without: str = "") -> str:
    """The row's own words where a template puts the prompt together from several columns."""
    return " ".join(v.strip() for k, v in fields.items() if isinstance(v, str) and k != without and v.strip())


def _label(value: Any, names: list[str] | None) -> str:
    if names and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(names):
            raise BadRowError(f"label {value} has no class name")
        return names[value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    label = "" if value is None or value != value else str(value).strip()
    if not label or isinstance(value, list | dict):
        raise BadRowError("label is empty" if not label else "label is neither text nor a number")
    return label


def _choices(fields: Mapping[str, Any], column: str | tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(letters, choices): the letters are A, B, … where the row has none of its own."""
    value = [fields.get(name) for name in column] if isinstance(column, tuple) else from_json_text(fields.get(column))
    letters: list[str] = []
    if isinstance(value, str):
        lettered = re.findall(r"^\s*\(?([A-Za-z0-9])[.):]\s*(.+?)\s*$", value, re.MULTILINE)
        letters, value = [letter for letter, _ in lettered], [choice for _, choice in lettered]
    elif isinstance(value, dict) and isinstance(value.get("text"), list):
        letters, value = [str(letter) for letter in value.get("label") or []], value["text"]
    elif isinstance(value, dict):
        letters, value = [str(letter) for letter in value], list(value.values())
    elif isinstance(value, list) and value and all(isinstance(choice, dict) for choice in value):
        letters = [str(choice["label"]) for choice in value if "label" in choice]
        value = [choice.get("text") for choice in value]
    if not isinstance(value, list) or len(value) < 2:
        raise BadRowError("fewer than two choices")
    choices = ["" if choice is None else str(choice).strip() for choice in value]
    if not all(choices):
        raise BadRowError("a choice is empty")
    if len(letters) != len(choices):
        letters = [chr(ord("A") + i) if i < 26 else str(i) for i in range(len(choices))]
    return letters, choices


def _gold(value: Any, letters: list[str], choices: list[str]) -> int:
    """Index of the right choice: given as its text, its letter, `A. its text`, or an index from 0."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRowError("answer is empty")
    if isinstance(value, (bool, list, dict)):
        raise BadRowError("answer is not a letter, an index or text")
    text = str(value).strip()
    folded, upper = [choice.casefold() for choice in choices], [letter.upper() for letter in letters]
    if text.casefold() in folded and not isinstance(value, int):
        return folded.index(text.casefold())
    if text.upper() in upper:
        return upper.index(text.upper())
    if re.fullmatch(r"\d+", text):
        if int(text) >= len(choices):
            raise BadRowError(f"answer is index {text} of {len(choices)} choices (indices start at 0)")
        return int(text)
    lettered = re.match(r"\(?([A-Za-z0-9])[.):]\s*(.*)", text)
    if lettered and lettered[2].strip().casefold() in folded:
        return folded.index(lettered[2].strip().casefold())
    raise BadRowError(f"answer {text[:40]!r} is not one of the choices")


def _answers(value: Any) -> list[str]:
    """Texts of an answer: a text, a list, SQuAD's `{text: […]}` or TriviaQA's `{value, aliases}`."""
    value = from_json_text(value)
    if isinstance(value, dict):
        value = value["text"] if "text" in value else [value.get("value"), *(value.get("aliases") or [])]
    values = value if isinstance(value, list) else [value]
    texts = [str(v["text"] if isinstance(v, dict) else v).strip() for v in values if v is not None]
    return list(dict.fromkeys(text for text in texts if text))
