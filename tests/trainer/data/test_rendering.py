"""Every task as prompt and answer: training and evaluation see the same, answers are never cut."""

from typing import Any

import pytest
from tests.support.assets import smollm2_directory
from tests.support.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from finetune_api.spec import Columns
from finetune_api.traits import Task
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.examples import Example, Reading, answer_survey, read_example
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.render import Rendering, few_shot_of, render_evaluation, render_training
from finetune_trainer.prepare.columns import find_columns

ROWS: dict[Task, dict[str, Any]] = {
    Task.CLASSIFICATION: {"text": "What a day", "label": "good"},
    Task.MULTIPLE_CHOICE: {"question": "Where is money kept?", "choices": ["bank", "mall"], "answer": "A"},
    Task.QUESTION_ANSWERING: {
        "question": "Who?",
        "context": "Ann did it.",
        "answers": {"text": ["Ann", "Ann herself"]},
    },
    Task.SUMMARIZATION: {"document": "A long story about a dog.", "summary": "A dog."},
    Task.TEXT: {"text": "Once upon a time."},
    Task.INSTRUCTION: {"instruction": "Add.", "input": "1 2", "output": "3"},
    Task.CHAT: {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat(AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def smollm2() -> ChatFormat:
    directory = smollm2_directory()
    return ChatFormat(AutoTokenizer.from_pretrained(directory))


def example(task: Task, row: dict[str, Any] | None = None, number: int = 7) -> Example:
    row = ROWS[task] if row is None else row
    found = find_columns(task, Columns(), list(row), templated=False, where="d", field="datasets[0]")
    survey = answer_survey(task, found, only_texts=False)
    if survey is None:
        return read_example(task, number, row, Reading(found))
    survey.add(row)
    return read_example(task, number, row, Reading(found, form=survey.form))


def how(task: Task, chat: ChatFormat, **settings: Any) -> Rendering:
    labels = ("bad", "good") if task is Task.CLASSIFICATION else ()
    return Rendering(**({"task": task, "format": chat, "max_tokens": 400, "labels": labels} | settings))


@pytest.mark.parametrize("task", Task)
def test_rows_of_every_task_are_read_and_rendered(tiny: ChatFormat, task: Task) -> None:
    assert render_training(how(task, tiny), example(task)).documents


def shown(chat: ChatFormat, rendering: Rendering, of: Example) -> tuple[str, str]:
    """(what is given before the first target, what is learnt) of the one document of a row."""
    [tokens] = render_training(rendering, of).documents
    decode = chat.tokenizer.decode
    return decode(tokens.ids[: tokens.target_position[0] + 1]), decode(tokens.target_id)


@pytest.mark.parametrize(
    ("task", "given", "learnt"),
    [
        (Task.CLASSIFICATION, "Classify the text. Answer with one of: bad, good.\n\nText: What a day", "good"),
        (Task.MULTIPLE_CHOICE, "Where is money kept?\n\nAnswer with one of:\n- bank\n- mall", "bank"),
        (Task.QUESTION_ANSWERING, "Answer the question from the text.\n\nText: Ann did it.\n\nQuestion: Who?", "Ann"),
        (Task.SUMMARIZATION, "Summarise the text.\n\nA long story about a dog.", "A dog."),
        (Task.INSTRUCTION, "Add.\n\n1 2", "3"),
        (Task.CHAT, "Hi", "Hello."),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_each_task_has_its_prompt_and_learns_its_answer(
    request: pytest.FixtureRequest, name: str, task: Task, given: str, learnt: str
) -> None:
    chat: ChatFormat = request.getfixturevalue(name)
    before, after = shown(chat, how(task, chat), example(task))
    assert before.endswith(f"<|im_start|>user\n{given}<|im_end|>\n<|im_start|>assistant\n")
    assert after == f"{learnt}<|im_end|>"


def test_a_text_is_learnt_from_its_second_token_to_its_end(tiny: ChatFormat) -> None:
    [tokens] = render_training(how(Task.TEXT, tiny), example(Task.TEXT)).documents
    assert tiny.tokenizer.decode(tokens.ids) == "Once upon a time.<|im_end|>"
    assert tokens.target_id == tokens.ids[1:]


@pytest.mark.parametrize("task", [Task.CLASSIFICATION, Task.MULTIPLE_CHOICE])
def test_evaluation_scores_the_very_tokens_that_training_learns(tiny: ChatFormat, task: Task) -> None:
    [tokens] = render_training(how(task, tiny), example(task)).documents
    [row] = render_evaluation(how(task, tiny), example(task), "d")
    assert row.candidates is not None
    assert row.candidate_ids is not None
    assert row.gold is not None
    assert tokens.ids == row.prompt_ids + row.candidate_ids[row.gold]
    assert tokens.target_id == row.candidate_ids[row.gold]
    assert row.id == "d/7"
    assert {ids[-1] for ids in row.candidate_ids} == {tiny.end_token_ids[0]}


def test_free_answers_are_evaluated_against_all_that_count(tiny: ChatFormat) -> None:
    [row] = render_evaluation(how(Task.QUESTION_ANSWERING, tiny), example(Task.QUESTION_ANSWERING), "d")
    assert (row.answers, row.candidates) == (["Ann", "Ann herself"], None)


@pytest.mark.parametrize("task", [Task.INSTRUCTION, Task.CHAT, Task.TEXT])
def test_instructions_chats_and_texts_are_evaluated_by_the_likelihood_of_what_training_learns(
    tiny: ChatFormat, task: Task
) -> None:
    [tokens] = render_training(how(task, tiny), example(task)).documents
    [row] = render_evaluation(how(task, tiny), example(task), "d")
    assert (row.ids, row.target_position, row.target_id) == (tokens.ids, tokens.target_position, tokens.target_id)


def test_a_user_s_templates_and_system_prompt_are_used(tiny: ChatFormat) -> None:
    rendering = how(
        Task.CLASSIFICATION,
        tiny,
        system_prompt="Be brief.",
        template="{{ text }}? ({{ labels | join('/') }})",
        answer_template="It is {{ label }}.",
    )
    given, learnt = shown(tiny, rendering, example(Task.CLASSIFICATION))
    assert given.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat a day? (bad/good)<|im_end|>"
    )
    assert learnt == "It is good.<|im_end|>"
    [row] = render_evaluation(rendering, example(Task.CLASSIFICATION), "d")
    assert [tiny.tokenizer.decode(ids) for ids in row.candidate_ids or []] == [
        "It is bad.<|im_end|>",
        "It is good.<|im_end|>",
    ]


def test_an_unanswerable_question_is_answered_so_and_the_prompt_says_it_may(tiny: ChatFormat) -> None:
    row = ROWS[Task.QUESTION_ANSWERING] | {"answers": {"text": []}}
    rendering = how(Task.QUESTION_ANSWERING, tiny, may_be_unanswerable=True)
    given, learnt = shown(tiny, rendering, example(Task.QUESTION_ANSWERING, row))
    assert "If the text does not answer it, say: unanswerable." in given
    assert learnt == "unanswerable<|im_end|>"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (Task.CLASSIFICATION, {"text": "word " * 200, "label": "good"}),
        (Task.SUMMARIZATION, {"document": "word " * 200, "summary": "A dog that ran and ran."}),
    ],
)
def test_a_long_text_is_cut_at_its_end_and_its_answer_never(tiny: ChatFormat, task: Task, row: dict[str, Any]) -> None:
    rendered = render_training(how(task, tiny), example(task, row))
    [tokens] = rendered.documents
    assert 350 < len(tokens.ids) <= 400
    assert rendered.cut_tokens > 500
    assert tiny.tokenizer.decode(tokens.target_id) == row.get("label", row.get("summary")) + "<|im_end|>"
    [scored] = render_evaluation(how(task, tiny), example(task, row), "d", answer_tokens=50)
    assert len(scored.prompt_ids) + 5 <= 400


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (Task.QUESTION_ANSWERING, {"question": "q", "context": "word " * 200, "answer": "a"}),
        (Task.MULTIPLE_CHOICE, {"question": "word " * 200, "choices": ["a", "b"], "answer": "a"}),
        (Task.SUMMARIZATION, {"document": "d", "summary": "word " * 200}),
        (Task.INSTRUCTION, {"prompt": "p", "input": "word " * 200, "completion": "c"}),
        (Task.CHAT, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * 200}]}),
    ],
)
def test_what_must_not_be_cut_and_does_not_fit_is_a_bad_row(tiny: ChatFormat, task: Task, row: dict[str, Any]) -> None:
    with pytest.raises(BadRowError, match=r"tokens do not fit into 400|more than 400 tokens"):
        render_training(how(task, tiny), example(task, row))


def test_a_long_chat_loses_its_oldest_exchanges_whole_and_keeps_its_system_prompt(tiny: ChatFormat) -> None:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i:02} " + "x" * 30} for i in range(20)]
    rendered = render_training(how(Task.CHAT, tiny, system_prompt="Be brief."), example(Task.CHAT, {"messages": turns}))
    [tokens] = rendered.documents
    text = tiny.tokenizer.decode(tokens.ids)
    assert len(tokens.ids) <= 400
    assert rendered.dropped_turns % 2 == 0
    assert text.startswith(
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nturn {rendered.dropped_turns:02}"
    )
    assert text.endswith("turn 19 " + "x" * 30 + "<|im_end|>")
    assert len(tokens.ids) + 2 * 55 > 400, "no more is dropped than needed"


def test_a_long_text_becomes_pieces_that_hold_every_token(tiny: ChatFormat) -> None:
    documents = render_training(how(Task.TEXT, tiny), example(Task.TEXT, {"text": "abcdefghij" * 100})).documents
    assert [len(document.ids) for document in documents] == [400, 400, 201]
    assert (
        tiny.tokenizer.decode([i for document in documents for i in document.ids]) == "abcdefghij" * 100 + "<|im_end|>"
    )


def test_an_instruction_has_the_system_prompt_of_its_row_after_the_job_s(tiny: ChatFormat) -> None:
    row = {"system_prompt": "Be kind.", "question": "Add 1 2.", "response": "3"}
    given, _ = shown(tiny, how(Task.INSTRUCTION, tiny, system_prompt="Be brief."), example(Task.INSTRUCTION, row))
    assert given.startswith("<|im_start|>system\nBe brief.\n\nBe kind.<|im_end|>\n<|im_start|>user\nAdd 1 2.")


def test_special_tokens_in_texts_are_letters_unless_they_are_asked_for(tiny: ChatFormat) -> None:
    rows = example(Task.TEXT, {"text": "<|im_start|>user\nHi<|im_end|>"})
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    [letters] = render_training(how(Task.TEXT, tiny), rows).documents
    [control] = render_training(how(Task.TEXT, tiny, special_tokens=True), rows).documents
    assert letters.ids.count(end) == 1, "only the one that ends the text"
    assert control.ids.count(end) == 1, "it is not written twice"
    assert tiny.tokenizer.decode(control.ids) == "<|im_start|>user\nHi<|im_end|>"
    assert len(letters.ids) > len(control.ids) + 20


def test_solved_examples_stand_before_the_question_as_many_as_fit(tiny: ChatFormat) -> None:
    rendering = how(Task.CLASSIFICATION, tiny)
    solved = [example(Task.CLASSIFICATION, {"text": f"day {i}", "label": "bad"}) for i in range(8)]
    shots = few_shot_of(rendering, solved)
    [row] = render_evaluation(rendering, example(Task.CLASSIFICATION), "d", few_shot=shots)
    text = tiny.tokenizer.decode(row.few_shot_prompt_ids or [])
    assert "Text: day 0<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>" in text
    assert "day 7" not in text
    assert text.endswith(row.prompt)
    assert len(row.few_shot_prompt_ids or []) + 5 <= 400
