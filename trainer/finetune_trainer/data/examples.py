"""From a raw row to an example of its task: labels, choices, answers and turns in one form. Pure.

A row that cannot become an example raises `BadRowError` with the reason; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.traits import Task
from finetune_trainer.data.answers import (
    AnswerForm,
    AnswerSurvey,
    ChoiceSurvey,
    Found,
    ListSurvey,
    answer_texts,
    gold_of,
    read_choices,
    without_blank_lines,
)
from finetune_trainer.data.messages import (
    BadRowError,
    Chat,
    read_chat,
    read_prompt_and_completion,
    refuse_media,
    without_empty_keys,
)

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
    """What the model has to answer: the label, the right choice, the first answer, the summary, the completion."""
    answers: list[str] = field(default_factory=list)
    """Everything that counts as right."""
    candidates: list[str] | None = None
    """Closed choices of this row."""
    gold: int | None = None
    """Index of the right one."""
    system: str = ""
    """System prompt of this row."""
    chat: Chat | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of a dataset are read: the same for all of them."""

    columns: Found
    """Role to column; several columns where each holds a part."""
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    """Names of integer labels, by column."""
    form: AnswerForm = AnswerForm.WRITTEN
    """What the answers are."""
    columnar: bool = False
    """The format gives all objects the same keys: null where a row has none."""


def read_example(task: Task, row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    """The example of one row. Raises BadRowError with the reason where it cannot be used."""
    return _READ[task](row, fields, reading)


def answer_survey(task: Task, found: Found, *, only_texts: bool) -> AnswerSurvey | None:
    """What finds out the form of the answers, where a task's rows leave it open.

    only_texts: the format of the data holds nothing else, as CSV.
    """
    if task is Task.MULTIPLE_CHOICE:
        return ChoiceSurvey(found)
    if task is Task.QUESTION_ANSWERING and only_texts:
        return ListSurvey(str(found["answer"]))
    return None


def _classification(row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    column = str(reading.columns["label"])
    label = _label(fields.get(column), reading.class_names.get(column))
    text = _text(fields, reading, "text") if "text" in reading.columns else all_text(fields, without=(column,))
    variables = {**fields, "text": text, "label": label, column: label}
    return Example(row, variables, text, label, [label])


def _multiple_choice(row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    choices = read_choices(fields, reading.columns["choices"])
    gold = gold_of(fields.get(str(reading.columns["answer"])), choices, reading.form)
    question = _text(fields, reading, "question") if "question" in reading.columns else ""
    context = _optional_text(fields, reading, "context")
    texts, right = choices.texts, choices.texts[gold]
    variables = {**fields, "question": question, "context": context, "choices": texts, "answer": right}
    text = " ".join(filter(None, (context, question or all_text(fields), *texts)))
    return Example(row, variables, text, right, [right], texts, gold)


def _question_answering(row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    column = str(reading.columns["answer"])
    answers = answer_texts(fields.get(column), reading.form)
    question = _text(fields, reading, "question") if "question" in reading.columns else ""
    context = _optional_text(fields, reading, "context")
    if not answers and not context:
        raise BadRowError("neither an answer nor a context" if "context" in reading.columns else "the answer is empty")
    answers = answers or [UNANSWERABLE]
    variables = {**fields, "question": question, "context": context, "answer": answers[0]}
    asked = question or all_text(fields, without=(column, str(reading.columns.get("context", ""))))
    return Example(row, variables, " ".join(filter(None, (asked, context))), answers[0], answers)


def _summarization(row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    column = str(reading.columns["summary"])
    document = _text(fields, reading, "document") if "document" in reading.columns else all_text(fields, (column,))
    summary = _answer(fields, reading, "summary")
    variables = {**fields, "document": document, "summary": summary, "answer": summary}
    return Example(row, variables, document, summary, [summary])


def _instruction(row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    column = str(reading.columns["completion"])
    prompt = _text(fields, reading, "prompt") if "prompt" in reading.columns else ""
    given = _optional_text(fields, reading, "input")
    completion = _answer(fields, reading, "completion")
    variables = {**fields, "prompt": prompt, "input": given, "completion": completion, "answer": completion}
    asked = prompt or all_text(fields, without=(column, str(reading.columns.get("input", ""))))
    text, system = " ".join(filter(None, (asked, given))), _optional_text(fields, reading, "system")
    return Example(row, variables, text, completion, [completion], system=system)


def _plain_text(row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    text = _raw_text(fields, reading, "text") if "text" in reading.columns else all_text(fields)
    return Example(row, {**fields, "text": text}, text)


def _chat(row: int, fields: Mapping[str, Any], reading: Reading) -> Example:
    refuse_media(fields)
    found = reading.columns
    if reading.columnar:
        fields = without_empty_keys(fields)
    tools, system = (fields.get(str(found[role])) if role in found else None for role in ("tools", "system"))
    column = found["messages"]
    if isinstance(column, tuple):
        chat = read_prompt_and_completion(*map(fields.get, column), tools=tools, system=system)
    else:
        chat = read_chat(fields.get(column), tools=tools, system=system)
    return Example(row, {**fields, "messages": chat.messages}, chat.text, chat=chat)


_READ: dict[Task, Callable[[int, Mapping[str, Any], Reading], Example]] = {
    Task.CLASSIFICATION: _classification,
    Task.MULTIPLE_CHOICE: _multiple_choice,
    Task.QUESTION_ANSWERING: _question_answering,
    Task.INSTRUCTION: _instruction,
    Task.CHAT: _chat,
    Task.SUMMARIZATION: _summarization,
    Task.TEXT: _plain_text,
}


def _raw_text(fields: Mapping[str, Any], reading: Reading, role: str) -> str:
    """The text as the data have it; of several columns their names and texts, a line each."""
    column = reading.columns[role]
    if isinstance(column, tuple):
        return "\n".join(f"{name}: {_scalar(fields.get(name), name)}" for name in column)
    return _scalar(fields.get(column), role)


def _scalar(value: Any, name: str) -> str:
    if isinstance(value, list | dict | bytes):
        hint = ": task chat reads messages" if isinstance(value, list) and value and isinstance(value[0], dict) else ""
        raise BadRowError(f"{name} is neither text nor a number{hint}")
    text = "" if value is None else str(value)
    if not text.strip():
        raise BadRowError(f"{name} is empty")
    return text


def _text(fields: Mapping[str, Any], reading: Reading, role: str) -> str:
    return _raw_text(fields, reading, role).strip()


def _answer(fields: Mapping[str, Any], reading: Reading, role: str) -> str:
    return without_blank_lines(_raw_text(fields, reading, role))


def _optional_text(fields: Mapping[str, Any], reading: Reading, role: str) -> str:
    value = fields.get(str(reading.columns[role])) if role in reading.columns else None
    return "" if value is None or value in ("", []) or not str(value).strip() else _scalar(value, role).strip()


def all_text(fields: Mapping[str, Any], without: tuple[str, ...] = ()) -> str:
    """The row's own words where a template puts the prompt together from several columns."""
    return " ".join(v.strip() for k, v in fields.items() if isinstance(v, str) and k not in without and v.strip())


def _label(value: Any, names: list[str] | None) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    label = "" if value is None or value != value else str(value).strip()
    if not label or isinstance(value, list | dict | bytes):
        raise BadRowError("label is empty" if not label else "label is neither text nor a number")
    is_name = isinstance(value, str) and names and label in names
    if not names or is_name or isinstance(value, bool) or not re.fullmatch(r"-?\d+", label):
        return label
    if not 0 <= int(label) < len(names):
        raise BadRowError(f"label {label} has no class name")
    return names[int(label)]
