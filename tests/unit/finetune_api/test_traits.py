"""The tables of methods and tasks: complete, and the only place where their names are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.spec import Columns, Dataset, Tuning
from finetune_api.traits import METHODS, TASKS, USUAL_COLUMNS, Method, Task

ROOT = Path(__file__).parents[3]
NAMES_METHODS = {
    "operator/finetune_api/traits.py",
    "operator/finetune_operator/cluster/observe.py",  # placeholder for a spec that cannot be read
    "operator/finetune_operator/sizing/memory.py",
    "trainer/finetune_trainer/model/adapters.py",
    "trainer/finetune_trainer/model/build.py",
}
NAMES_TASKS = {"operator/finetune_api/traits.py", "trainer/finetune_trainer/data/examples.py"}
"""The tables, and the implementations, each of which is one method's or one task's own."""
TEXTS = "|".join((*Method, *Task))
COMPARED_AS_TEXT = re.compile(
    rf"""(method|task)(\.value)?\s*(==|!=|in|not\s+in)\s*[({{\[]?["']({TEXTS})["']"""
    rf"""|["']({TEXTS})["']\s*(==|!=)\s*[\w.]*(method|task)"""
)


def files() -> Iterator[tuple[str, str]]:
    for part in ("operator", "trainer"):
        for path in sorted((ROOT / part).rglob("*")):
            if path.suffix in (".py", ".j2"):
                yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_each_method_and_each_task_has_one_row() -> None:
    assert list(METHODS) == list(Method)
    assert list(TASKS) == list(Task)


@pytest.mark.parametrize("method", Method)
def test_a_methods_row_names_fields_of_the_spec(method: Method) -> None:
    assert set(method.traits.blocks) < set(Tuning.model_fields)
    assert (Tuning(method=method).virtual_tokens > 0) == method.traits.prepends_tokens


@pytest.mark.parametrize("task", Task)
def test_a_tasks_row_names_fields_of_the_spec(task: Task) -> None:
    traits = task.traits
    assert set(traits.columns) <= set(Columns.model_fields) == set(USUAL_COLUMNS)
    assert set(traits.optional_columns) < set(traits.columns)
    assert set(traits.without_effect) <= {field.alias for field in Dataset.model_fields.values()}
    assert traits.cut_from in ("", *traits.columns)


def test_methods_and_tasks_are_named_in_the_tables_and_the_implementations_only() -> None:
    texts = dict(files())
    assert {path for path, text in texts.items() if re.search(r"\bMethod\.[A-Z]", text)} == NAMES_METHODS
    assert {path for path, text in texts.items() if re.search(r"\bTask\.[A-Z]", text)} == NAMES_TASKS


def test_nobody_compares_the_text_of_a_method_or_task() -> None:
    rules = "operator/finetune_api/spec.py"  # CEL, which the API server evaluates
    assert {path for path, text in files() if COMPARED_AS_TEXT.search(text)} <= {rules}
