"""Rows as datasets hold them become examples of one form, and what is wrong with the others is said."""

from typing import Any

import pytest

from finetune_api.spec import Columns
from finetune_api.traits import Task
from finetune_trainer.data.examples import Example, read_example
from finetune_trainer.data.messages import BadRowError, read_messages
from finetune_trainer.prepare.columns import find_columns

TALK = [("user", "Hi"), ("assistant", "Hello"), ("user", "More"), ("assistant", "No")]
MESSAGES = [{"role": role, "content": content} for role, content in TALK]


def example(task: Task, row: dict[str, Any], names: dict[str, list[str]] | None = None) -> Example:
    found = find_columns(task, Columns(), list(row), templated=False, where="d", field="datasets[0]")
    return read_example(task, 1, row, found, names or {})


@pytest.mark.parametrize(
    "value",
    [
        MESSAGES,
        [{"from": "human" if role == "user" else "gpt", "value": content} for role, content in TALK],
        [content for _, content in TALK],
        [{"sender": "7208" if role == "user" else "549c", "text": content} for role, content in TALK],
        [[{"sender": "a", "text": "Hi"}], [{"sender": "b", "text": "Hello"}], [{"sender": "a", "text": "More"}],
         [{"sender": "b", "text": "No"}]],
        {"role": [role for role, _ in TALK], "content": [content for _, content in TALK]},
        [*MESSAGES, {"role": "user", "content": "And then?"}],
        '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},'
        ' {"role": "user", "content": "More"}, {"role": "assistant", "content": "No"}]',
    ],
    ids=["roles", "sharegpt", "plain", "two people", "turns of messages", "columns", "unanswered end", "json text"],
)  # fmt: skip
def test_chats_of_every_form_become_roles_and_contents(value: Any) -> None:
    assert read_messages(value) == MESSAGES


def test_several_messages_of_one_person_become_one_turn() -> None:
    said = [("ann", "Hi"), ("ann", "There?"), ("bob", "Yes"), ("ann", "Good"), ("bob", "Bye")]
    assert [m["content"] for m in read_messages([{"speaker": who, "text": text} for who, text in said])] == [
        "Hi\nThere?", "Yes", "Good", "Bye",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B"},
        {"question": "q", "choices": ["bank", "mall"], "answer": 1},
        {"question": "q", "choices": ["bank", "mall"], "answer": "mall"},
        {"question": "q", "options": "\nA. bank\nB. mall", "answer": "B. mall"},
        {"question": "q", "choices": [{"label": "1", "text": "bank"}, {"label": "2", "text": "mall"}], "answer": "2"},
        {"goal": "q", "sol1": "bank", "sol2": "mall", "label": "1"},
    ],
    ids=["commonsense", "index", "text", "lettered text", "numbered", "a column each"],
)
def test_multiple_choice_of_every_form_is_understood(row: dict[str, Any]) -> None:
    read = example(Task.MULTIPLE_CHOICE, row)
    assert (read.candidates, read.gold, read.answer) == (["bank", "mall"], 1, "mall")


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("Paris", ["Paris"]),
        (["Paris", "paris, France", "Paris"], ["Paris", "paris, France"]),
        ({"text": ["Paris"], "answer_start": [3]}, ["Paris"]),
        ({"value": "Paris", "aliases": ["City of Light"]}, ["Paris", "City of Light"]),
        ({"text": [], "answer_start": []}, ["unanswerable"]),
    ],
)
def test_answers_of_every_form_are_understood(value: Any, answers: list[str]) -> None:
    read = example(Task.QUESTION_ANSWERING, {"question": "q", "context": "c", "answers": value})
    assert read.answers == answers


def test_integer_labels_get_their_names() -> None:
    row = {"text": "t", "label": 1}
    assert example(Task.CLASSIFICATION, row, {"label": ["no", "yes"]}).answer == "yes"
    assert example(Task.CLASSIFICATION, row).answer == "1"


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        (Task.CLASSIFICATION, {"text": " ", "label": "a"}, "text is empty"),
        (Task.CLASSIFICATION, {"text": "t", "label": None}, "label is empty"),
        (Task.CLASSIFICATION, {"text": "t", "label": float("nan")}, "label is empty"),
        (
            Task.MULTIPLE_CHOICE,
            {"question": "q", "choices": ["a", "b"], "answer": "c"},
            "'c' is not one of the choices",
        ),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a", "b"], "answer": 2}, "indices start at 0"),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a", "A"], "answer": 0}, "occurs twice"),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a"], "answer": 0}, "fewer than two choices"),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a", ""], "answer": 0}, "a choice is empty"),
        (Task.QUESTION_ANSWERING, {"question": "q", "answer": ""}, "the answer is empty"),
        (Task.CHAT, {"messages": []}, "messages is empty"),
        (Task.CHAT, {"messages": MESSAGES[:1]}, "no assistant turn"),
        (Task.CHAT, {"messages": MESSAGES[1:2]}, "nothing before the first assistant turn"),
        (Task.CHAT, {"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "an assistant turn is empty"),
        (Task.CHAT, {"messages": [{"role": "user"}]}, "a message has no content"),
        (Task.SUMMARIZATION, {"document": "d", "summary": None}, "summary is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(task: Task, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as error:
        example(task, row)
    assert reason in str(error.value)
