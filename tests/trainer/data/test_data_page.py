"""docs/data.md shows, for every task, what the code makes of the row that it shows."""

import json
import re
from pathlib import Path

import pytest

from finetune_api.spec import Columns
from finetune_api.traits import Task
from finetune_trainer.data.examples import Example, Reading, answer_survey, read_example
from finetune_trainer.data.render import Rendering, question_text
from finetune_trainer.prepare.columns import find_columns

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `([a-z-]+)`\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))


def example_of(task: Task) -> Example:
    [row] = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SECTIONS[task], re.DOTALL)]
    found = find_columns(task, Columns(), list(row), templated=False, where="the page", field="datasets[0]")
    survey = answer_survey(task, found, only_texts=False)
    if survey is None:
        return read_example(task, 1, row, Reading(found))
    survey.add(row)
    return read_example(task, 1, row, Reading(found, form=survey.form))


def test_the_page_has_a_section_for_each_task_in_the_order_of_the_table() -> None:
    assert list(SECTIONS) == list(Task)


@pytest.mark.parametrize("task", Task)
def test_a_task_s_section_shows_prompt_answer_and_metric(task: Task) -> None:
    example = example_of(task)
    prompts = re.findall(r"```text\n(.*?)\n```", SECTIONS[task], re.DOTALL)
    [learnt] = re.findall(r"The model learns `(.*?)`", SECTIONS[task])
    if task.traits.form == "chat":
        *given, answer = [(message["role"], message["content"]) for message in example.variables["messages"]]
        assert (given, answer) == ([("user", prompts[0])], ("assistant", learnt))
    elif task.traits.form == "text":
        assert (prompts, learnt) == ([], example.variables["text"])
    else:
        rendering = Rendering(task, None, 0, labels=("complaint", "praise"))  # type: ignore[arg-type]
        assert ([question_text(rendering, example.variables)], example.answer) == (prompts, learnt)
    assert f"Primary metric: `{task.traits.primary_metric}`" in SECTIONS[task]
