"""Which answer is right, as datasets say it: one of a row's choices, or texts. Pure.

What the answers of a dataset mean is decided once, on all of its rows: `2` may be a choice's text, its label, or its
number counted from 0 or from 1, but never one thing in one row and another in the next.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_trainer.data.messages import BadRowError

Found = Mapping[str, str | tuple[str, ...]]

LONGEST_LITERAL = 1 << 16
"""Characters of a list that is read as one of Python's."""
USABLE_SHARE = 0.95
"""Share of the answers that must be lists for all of them to be read as lists."""

_LABELLED = re.compile(r"\(?(\w{1,2})[.):]+\s*(.*)", re.DOTALL)


class AnswerForm(StrEnum):
    """What the answers of a dataset are, as notes say it."""

    WRITTEN = "texts"
    LISTS = "lists written as text: every entry is right, and the first is learnt"
    LABEL = "the labels that the rows give their choices"
    TEXT = "the texts of the choices"
    LETTER = "letters, A for the first choice"
    FROM_0 = "numbers of the choices, counted from 0"
    FROM_1 = "numbers of the choices, counted from 1"


# --- choices ---


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of a row."""

    texts: list[str]
    labels: list[str]
    """What the row itself calls them, as `A` in `A. mall`; empty if it does not."""


def read_choices(fields: Mapping[str, Any], column: str | tuple[str, ...]) -> Choices:
    """The choices of a row, without the empty ones that fill up lists. Raises BadRowError with the reason."""
    value = [fields.get(name) for name in column] if isinstance(column, tuple) else _parsed(fields.get(column))
    labels: list[Any] = list(column) if isinstance(column, tuple) else []
    if isinstance(value, str):
        lettered = re.findall(r"^\s*\(?([A-Za-z0-9])[.):]\s*(.+?)\s*$", value, re.MULTILINE)
        labels, value = [label for label, _ in lettered], [choice for _, choice in lettered]
    elif isinstance(value, dict) and isinstance(value.get("text"), list):
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, dict):
        labels, value = list(value), list(value.values())
    elif isinstance(value, list) and value and all(isinstance(choice, dict) for choice in value):
        labels = [choice["label"] for choice in value if "label" in choice]
        value = [choice.get("text") for choice in value]
    if not isinstance(value, list):
        raise BadRowError("fewer than two choices")
    texts = ["" if choice is None else str(choice).strip() for choice in value]
    while texts and not texts[-1]:
        texts.pop()
    if len(texts) < 2:
        raise BadRowError("fewer than two choices")
    if not all(texts):
        raise BadRowError("a choice is empty")
    named = [str(label).strip() for label in labels[: len(texts)]] if isinstance(labels, list) else []
    return Choices(texts, named if len(named) == len(texts) and len(set(named)) == len(named) else [])


def gold_by_form(value: Any, choices: Choices) -> dict[AnswerForm, int]:
    """The choice that an answer names in each form in which it names one. Raises BadRowError where it is none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (bool, list, dict)):
        raise BadRowError("answer is not a letter, an index or text")
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise BadRowError("answer is empty")
    if re.fullmatch(r"\d+\.0+", text):
        text = text.partition(".")[0]
    labelled = _LABELLED.fullmatch(text)
    label, said = labelled.groups() if labelled else (text, "")
    folded = [choice.casefold() for choice in choices.texts]
    found = {
        AnswerForm.LABEL: _index(label.upper(), [own.upper() for own in choices.labels]),
        AnswerForm.TEXT: _index(text.casefold(), folded),
        AnswerForm.LETTER: _index(label.upper(), [chr(ord("A") + i) for i in range(min(len(folded), 26))]),
        AnswerForm.FROM_0: _index(label, [str(i) for i in range(len(folded))]),
        AnswerForm.FROM_1: _index(label, [str(i + 1) for i in range(len(folded))]),
    }
    if said:  # `B. mall` names a choice twice, and has to name the same one
        found |= {form: at if at is not None and folded[at] == said.casefold() else None for form, at in found.items()}
        found[AnswerForm.TEXT] = _index((text if text.casefold() in folded else said).casefold(), folded)
    return {form: at for form, at in found.items() if at is not None}


def gold_of(value: Any, choices: Choices, form: AnswerForm) -> int:
    """Index of the right choice. Raises BadRowError where the answer does not name one in that form, or names two."""
    found = gold_by_form(value, choices)
    if form not in found:
        raise BadRowError(f"answer {str(value).strip()[:40]!r} is not one of the choices (answers are {form})")
    gold = found[form]
    if [choice.casefold() for choice in choices.texts].count(choices.texts[gold].casefold()) > 1:
        raise BadRowError("the right choice occurs twice")
    return gold


def _index(value: str, known: list[str]) -> int | None:
    return known.index(value) if value in known else None


# --- texts ---


def answer_texts(value: Any, form: AnswerForm) -> list[str]:
    """The texts that answer a question: of a text, a list, SQuAD's `{text: […]}` or TriviaQA's `{value, aliases}`.

    None where the data say that there is no answer: null or an empty list. Raises BadRowError with the reason.
    """
    if isinstance(value, str) and form is AnswerForm.LISTS:
        value = _parsed(value)
        if isinstance(value, str):
            raise BadRowError("the answer is empty" if not value.strip() else "the answer is not a list")
    if isinstance(value, dict):
        value = _of_object(value)
    values = [None if entry != entry else entry for entry in (value if isinstance(value, list) else [value])]
    given = [_of_object(entry) if isinstance(entry, dict) else entry for entry in values if entry is not None]
    if any(isinstance(entry, list | dict | bytes) for entry in given):
        raise BadRowError("an answer is neither text nor a number")
    texts = list(dict.fromkeys(text for text in map(without_blank_lines, map(str, given)) if text))
    if given and not texts:
        raise BadRowError("the answer is empty")
    return texts


def without_blank_lines(text: str) -> str:
    """The text without the blank lines around it and the spaces at its end. Its indentation stays."""
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()


def _of_object(value: Mapping[str, Any]) -> Any:
    if "value" in value and "text" not in value:
        return [value["value"], *(value.get("aliases") or [])] if "aliases" in value else value["value"]
    name = next((name for name in ("text", "answer") if name in value), None)
    if name is None:
        raise BadRowError(f"an answer is an object without text, answer or value: it has {', '.join(map(str, value))}")
    return value[name]


def _parsed(value: Any) -> Any:
    """A list or object that is written as text, by JSON, Python or numpy; anything else as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            found = _python_value(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            return value
    return found if isinstance(found, list | dict) else value


def _python_value(text: str) -> Any:
    """`['a', 'b']`, `{'text': array(['a'], dtype=object)}`, and `['a' 'b']` as numpy writes its arrays."""
    if len(text) > LONGEST_LITERAL:
        raise ValueError("too long")
    tokens: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NL:
            continue
        if tokens and tokens[-1][0] == token.type == tokenize.STRING:
            tokens.append((tokenize.OP, ","))
        tokens.append((token.type, token.string))
    return _value_of(ast.parse(tokenize.untokenize(tokens).strip(), mode="eval").body)


def _value_of(node: ast.expr) -> Any:
    match node:
        case ast.Constant(str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.Name("nan"):
            return None
        case ast.List(entries) | ast.Tuple(entries):
            return [_value_of(entry) for entry in entries]
        case ast.Dict(keys, values):
            return {_value_of(key): _value_of(value) for key, value in zip(keys, values, strict=True) if key}
        case ast.Call(ast.Name("array"), [entry]):
            return _value_of(entry)
    raise ValueError("not a value")


# --- one form for all rows ---


class AnswerSurvey(ABC):
    """Finds out what the answers of a dataset are, from its rows one by one."""

    decided = False
    """Whether further rows cannot change it."""

    @abstractmethod
    def add(self, fields: Mapping[str, Any]) -> None:
        """Look at one row."""

    @property
    @abstractmethod
    def form(self) -> AnswerForm:
        """What the answers are."""

    @property
    def notes(self) -> list[str]:
        """What was decided, in sentences."""
        return [f"answers are {self.form}"]


class ChoiceSurvey(AnswerSurvey):
    """The form in which the most answers name a choice."""

    def __init__(self, found: Found) -> None:
        """found: role to column."""
        self._choices, self._answer = found["choices"], str(found["answer"])
        self._rows: Counter[AnswerForm] = Counter()
        self._differ: set[tuple[AnswerForm, AnswerForm]] = set()
        self._numbers = self._texts = 0

    def add(self, fields: Mapping[str, Any]) -> None:
        """Look at one row."""
        value = fields.get(self._answer)
        try:
            found = gold_by_form(value, read_choices(fields, self._choices))
        except BadRowError:
            return
        self._rows.update(found.keys())
        self._differ |= {(a, b) for a, at in found.items() for b, other in found.items() if at != other}
        self._numbers += isinstance(value, int | float)
        self._texts += isinstance(value, str)

    @property
    def form(self) -> AnswerForm:
        """The row's own labels before texts before letters before numbers; numbers of the data are no texts."""
        order = [AnswerForm.LABEL, AnswerForm.TEXT, AnswerForm.LETTER, AnswerForm.FROM_0, AnswerForm.FROM_1]
        if self._numbers > self._texts:
            order.append(order.pop(1))
        return max(order, key=lambda form: (self._rows[form], -order.index(form)))

    @property
    def notes(self) -> list[str]:
        """What was decided, and whether it might be otherwise."""
        form = self.form
        others = [other for one, other in sorted(self._differ) if one is form and self._rows[other] == self._rows[form]]
        if form is AnswerForm.LABEL:
            others = []  # they are there to be named
        doubt = f"; they could also be {others[0]}, as no row decides it" if others else ""
        return [f"answers are {form}{doubt}"]


class ListSurvey(AnswerSurvey):
    """Whether the texts of a column that can hold nothing else are lists: only if every one of them looks like one."""

    def __init__(self, column: str) -> None:
        """column: that of the answers."""
        self._column, self._bracketed, self._lists = column, 0, 0

    def add(self, fields: Mapping[str, Any]) -> None:
        """Look at one row."""
        value = fields.get(self._column)
        if not isinstance(value, str) or not value.strip() or self.decided:
            return
        parsed = _parsed(value)
        self._bracketed += 1
        self._lists += isinstance(parsed, list) or (
            isinstance(parsed, dict) and not {"text", "value"}.isdisjoint(parsed)
        )
        self.decided = value.strip()[0] + value.strip()[-1] not in ("[]", "{}")

    @property
    def form(self) -> AnswerForm:
        """Lists, or texts."""
        lists = self._lists and not self.decided and self._lists >= USABLE_SHARE * self._bracketed
        return AnswerForm.LISTS if lists else AnswerForm.WRITTEN
