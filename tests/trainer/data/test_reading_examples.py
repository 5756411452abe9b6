"""Rows as datasets hold them become examples of one form, and what is wrong with the others is said."""

from typing import Any

import pytest

from finetune_api.spec import Columns
from finetune_api.traits import Task
from finetune_trainer.data.answers import AnswerForm
from finetune_trainer.data.examples import Example, Reading, answer_survey, read_example
from finetune_trainer.data.messages import BadRowError, read_chat
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.columns import column_notes, find_columns

TALK = [("user", "Hi"), ("assistant", "Hello"), ("user", "More"), ("assistant", "No")]
MESSAGES = [{"role": role, "content": content} for role, content in TALK]


def reading(
    task: Task, rows: list[dict[str, Any]], names: dict[str, list[str]] | None = None, *, csv: bool = False
) -> tuple[Reading, list[str]]:
    """How these rows are read, and what is said of it."""
    found = find_columns(task, Columns(), list(rows[0]), templated=False, where="d", field="datasets[0]")
    survey = answer_survey(task, found, only_texts=csv)
    if survey is None:
        return Reading(found, names or {}), []
    for row in rows:
        survey.add(row)
    return Reading(found, names or {}, survey.form), survey.notes


def examples(task: Task, rows: list[dict[str, Any]], *, csv: bool = False) -> list[Example]:
    as_read, _ = reading(task, rows, csv=csv)
    return [read_example(task, number, row, as_read) for number, row in enumerate(rows, start=1)]


def example(task: Task, row: dict[str, Any], names: dict[str, list[str]] | None = None) -> Example:
    return read_example(task, 1, row, reading(task, [row], names)[0])


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
    assert read_chat(value).messages == MESSAGES


def test_several_messages_of_one_person_become_one_turn() -> None:
    said = [("ann", "Hi"), ("ann", "There?"), ("bob", "Yes"), ("ann", "Good"), ("bob", "Bye")]
    assert [m["content"] for m in read_chat([{"speaker": who, "text": text} for who, text in said]).messages] == [
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
        ([], ["unanswerable"]),
        (None, ["unanswerable"]),
        ([{"answer": "Paris", "score": 1}], ["Paris"]),
        ([None, 1903], ["1903"]),
        (True, ["True"]),
    ],
)
def test_answers_of_every_form_are_understood(value: Any, answers: list[str]) -> None:
    read = example(Task.QUESTION_ANSWERING, {"question": "q", "context": "c", "answers": value})
    assert read.answers == answers


def asked(*rows: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Questions with these choices (texts that begin with a letter are lists of words) and answers."""
    split = [
        (choices.split() if isinstance(choices, str) and choices[0] not in "[{" else choices) for choices, _ in rows
    ]
    return [
        {"question": "q", "choices": choices, "answer": answer}
        for choices, (_, answer) in zip(split, rows, strict=True)
    ]


OWN = {"label": ["A", "B", "C", "D"], "text": ["D", "C", "B", "A"]}
NUMBERED = {"label": ["1", "2", "3", "4"], "text": ["3", "4", "1", "2"]}
BY_PANDAS = "{'label': array(['A', 'B'], dtype=object), 'text': array(['x', 'y'])}"


@pytest.mark.parametrize(
    ("rows", "right", "form"),
    [
        (asked((OWN, "B"), (NUMBERED, "2")), ["C", "4"], AnswerForm.LABEL),
        (asked(("x y", "1"), ("x y", 2)), ["x", "y"], AnswerForm.FROM_1),
        (asked(("x y", "1"), ("x y", "0")), ["y", "x"], AnswerForm.FROM_0),
        (asked(("x y", 1.0), ("x y", "2.0")), ["x", "y"], AnswerForm.FROM_1),
        (asked(("2 9 4", "2"), ("7 8", "8")), ["2", "8"], AnswerForm.TEXT),
        (asked(("2 9 4", 2), ("7 8", 1)), ["4", "8"], AnswerForm.FROM_0),
        (asked(("B A", "B"), ("x y", "A")), ["A", "x"], AnswerForm.LETTER),
        (asked(("x y", "B."), ("x y", "(A)")), ["y", "x"], AnswerForm.LETTER),
        (asked((["x", "y", None, ""], "y"), ("x y z", "z")), ["y", "z"], AnswerForm.TEXT),
        ([{"option1": "x", "option2": "y", "answer": "2"}], ["y"], AnswerForm.FROM_1),
        ([{"answerA": "x", "answerB": "y", "answerC": "z", "label": "3"}], ["z"], AnswerForm.FROM_1),
        ([{"option1": "x", "option2": "y", "answer": "option2"}], ["y"], AnswerForm.LABEL),
        (asked((BY_PANDAS, "B")), ["y"], AnswerForm.LABEL),
        (asked(("['x' 'y z']", "y z")), ["y z"], AnswerForm.TEXT),
        (asked(("x y", ["B"])), ["y"], AnswerForm.LETTER),
    ],
    ids=["own labels", "from 1", "from 0", "floats", "texts", "numbers", "letters", "written letters", "filled up",
         "winogrande", "siqa", "names of columns", "pandas", "numpy", "list of one"],
)  # fmt: skip
def test_what_an_answer_means_is_decided_by_the_row_s_labels_and_on_all_rows(
    rows: list[dict[str, Any]], right: list[str], form: AnswerForm
) -> None:
    rows = [{"question": "q", **row} for row in rows]
    assert [read.answer for read in examples(Task.MULTIPLE_CHOICE, rows)] == right
    assert reading(Task.MULTIPLE_CHOICE, rows)[1][0].partition("; they could")[0] == f"answers are {form}"


def test_answers_that_can_be_counted_from_0_or_1_are_said_to_be_so() -> None:
    rows = asked(("x y z", 1), ("x y z", 2))
    assert reading(Task.MULTIPLE_CHOICE, rows)[1] == [
        "answers are numbers of the choices, counted from 0; they could also be numbers of the choices, counted from "
        "1, as no row decides it"
    ]


def test_an_answer_with_a_letter_and_another_choice_s_text_is_refused() -> None:
    rows = asked(("x y", "A. x"), ("x y", "B. y"), ("x y", "A. y"))
    as_read = Reading(reading(Task.MULTIPLE_CHOICE, rows)[0].columns, {}, AnswerForm.LETTER)
    with pytest.raises(BadRowError, match=r"'A\. y' is not one of the choices \(answers are letters"):
        read_example(Task.MULTIPLE_CHOICE, 3, rows[2], as_read)


@pytest.mark.parametrize(
    "text",
    [
        '{"city": "Bern", "year": 1903}',
        '{"text": "Paris", "n": 1}',
        '["Bern", "Basel"]',
        "[]",
        "  y = 1\n  return y",
        "null",
    ],
)
def test_a_text_is_the_answer_whatever_it_looks_like(text: str) -> None:
    row = {"question": "q", "context": "c", "answer": text}
    assert example(Task.QUESTION_ANSWERING, row).answers == [text]
    others = [row, row | {"answer": "Paris"}]
    assert [read.answer for read in examples(Task.QUESTION_ANSWERING, others, csv=True)] == [text, "Paris"]


@pytest.mark.parametrize(
    ("answers", "read"),
    [
        (["['Ann 0', 'ann 0']", "['Ann 1']"], [["Ann 0", "ann 0"], ["Ann 1"]]),
        (['["Ann 0"]', "[]"], [["Ann 0"], ["unanswerable"]]),
        (["['Ann' 'an\\'n'\n 'a\"b']", "[]"], [["Ann", "an'n", 'a"b'], ["unanswerable"]]),
        (
            ["{'text': array(['Ann 1'], dtype=object), 'answer_start': array([0], dtype=int32)}",
             "{'text': array([], dtype=object), 'answer_start': array([], dtype=int32)}"],
            [["Ann 1"], ["unanswerable"]],
        ),
        (['{"city": "Bern"}', '{"city": "Basel"}'], [['{"city": "Bern"}'], ['{"city": "Basel"}']]),
    ],
    ids=["python", "json", "numpy", "squad by pandas", "objects"],
)  # fmt: skip
def test_lists_in_a_csv_column_that_holds_nothing_else_are_lists(answers: list[str], read: list[list[str]]) -> None:
    rows = [{"question": "q", "context": "c", "answer": answer} for answer in answers]
    assert [found.answers for found in examples(Task.QUESTION_ANSWERING, rows, csv=True)] == read


@pytest.mark.parametrize("expression", ["[__import__('os')]", "[1 + 1]", "[x for x in 'ab']", "[" * 500, "[f'{1}']"])
def test_a_list_is_never_computed(expression: str) -> None:
    rows = [{"question": "q", "answer": expression}]
    assert examples(Task.QUESTION_ANSWERING, rows, csv=True)[0].answers == [expression]


def test_indentation_of_answers_stays_and_blank_lines_around_them_go() -> None:
    body = "\n    y = x + 1\n    return y\n"
    assert example(Task.QUESTION_ANSWERING, {"question": "q", "answer": body}).answer == "    y = x + 1\n    return y"
    assert example(Task.INSTRUCTION, {"prompt": "p", "completion": body}).answer == "    y = x + 1\n    return y"
    assert example(Task.SUMMARIZATION, {"document": "d", "summary": "\tx"}).answer == "\tx"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "context": "1 2", "response": "3", "category": "math"},
        {"prompt": "Add.", "input": "1 2", "completion": "3"},
    ],
    ids=["alpaca", "dolly", "prompt and completion"],
)
def test_instructions_of_every_form_are_understood(row: dict[str, Any]) -> None:
    read = example(Task.INSTRUCTION, row)
    assert (read.variables["prompt"], read.variables["input"], read.answer, read.text) == (
        "Add.",
        "1 2",
        "3",
        "Add. 1 2",
    )
    without = example(Task.INSTRUCTION, {name: value for name, value in row.items() if value != "1 2"})
    assert (without.variables["input"], without.text) == ("", "Add.")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "q", "sentence": "s", "label": 0}, "question: q\nsentence: s"),
        ({"premise": "p", "hypothesis": "h", "label": "yes"}, "premise: p\nhypothesis: h"),
        ({"sentence1": "a", "sentence2": "b", "idx": 1, "label": "x"}, "sentence1: a\nsentence2: b"),
        ({"question": "is it", "passage": "It is.", "answer": True}, "question: is it\npassage: It is."),
        ({"text": "t", "premise": "p", "hypothesis": "h", "label": "x"}, "t"),
    ],
)
def test_both_texts_of_a_pair_are_what_is_classified(row: dict[str, Any], text: str) -> None:
    assert example(Task.CLASSIFICATION, row).text == text


@pytest.mark.parametrize("task", [Task.INSTRUCTION, Task.CHAT, Task.QUESTION_ANSWERING])
def test_preference_pairs_are_recognised(task: Task) -> None:
    with pytest.raises(TrainerError, match=r"holds preference pairs .* not supported yet"):
        find_columns(task, Columns(), ["prompt", "chosen", "rejected"], templated=False, where="d", field="datasets[0]")


@pytest.mark.parametrize(
    ("task", "present", "hint"),
    [
        (Task.QUESTION_ANSWERING, ["prompt", "completion"], "Its columns fit task instruction."),
        (Task.SUMMARIZATION, ["question", "choices", "answerKey"], "Its columns fit task multiple-choice."),
        (Task.CLASSIFICATION, ["a", "b"], "to one of its columns: a, b."),
    ],
)
def test_columns_that_fit_another_task_are_told_so(task: Task, present: list[str], hint: str) -> None:
    with pytest.raises(TrainerError) as refused:
        find_columns(task, Columns(), present, templated=False, where="d", field="datasets[0]")
    assert str(refused.value).endswith(hint)


def test_which_columns_are_taken_and_which_are_not_is_said() -> None:
    present = ["premise", "hypothesis", "gold", "idx", "author", "class"]
    found = find_columns(Task.CLASSIFICATION, Columns(label="gold"), present, templated=False, where="d", field="d")
    assert column_notes(found, Columns(label="gold"), present, ["author"]) == [
        "columns found by their names: text is premise + hypothesis",
        "columns that are not used: idx, class",
    ]
    of_preferences = {"prompt": "prompt", "completion": "completion"}
    notes = column_notes(of_preferences, Columns(), ["prompt", "completion", "label"], [])
    assert notes[0].startswith("completions with a false label are learnt like others")


def test_integer_labels_get_their_names() -> None:
    assert example(Task.CLASSIFICATION, {"text": "t", "label": "1"}, {"label": ["no", "yes"]}).answer == "yes"
    assert example(Task.CLASSIFICATION, {"text": "t", "label": "no"}, {"label": ["no", "yes"]}).answer == "no"
    assert example(Task.CLASSIFICATION, {"text": "t", "label": 0}, {"label": ["1", "0"]}).answer == "1"
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
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a", "b"], "answer": 3}, "'3' is not one of the choices"),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a", "b"], "answer": True}, "not a letter, an index or"),
        (Task.QUESTION_ANSWERING, {"question": "q", "context": "c", "answer": ""}, "the answer is empty"),
        (Task.QUESTION_ANSWERING, {"question": "q", "context": "", "answer": None}, "neither an answer nor a context"),
        (
            Task.QUESTION_ANSWERING,
            {"question": "q", "answer": [{"score": 1}]},
            "without text, answer or value: it has score",
        ),
        (Task.QUESTION_ANSWERING, {"question": "q", "answer": [["a"]]}, "an answer is neither text nor a number"),
        (Task.QUESTION_ANSWERING, {"question": ["q"], "answer": "a"}, "question is neither text nor a number"),
        (
            Task.INSTRUCTION,
            {"prompt": [{"role": "user"}], "completion": "a"},
            "prompt is neither .* task chat reads mess",
        ),
        (Task.INSTRUCTION, {"prompt": "p", "completion": "\n"}, "completion is empty"),
        (Task.CLASSIFICATION, {"text": b"t", "label": "a"}, "text is neither text nor a number"),
        (Task.CLASSIFICATION, {"premise": "p", "hypothesis": None, "label": "a"}, "hypothesis is empty"),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a", "A"], "answer": 0}, "occurs twice"),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["a"], "answer": 0}, "fewer than two choices"),
        (Task.MULTIPLE_CHOICE, {"question": "q", "choices": ["", "b"], "answer": 0}, "a choice is empty"),
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
    with pytest.raises(BadRowError, match=reason):
        example(task, row)
