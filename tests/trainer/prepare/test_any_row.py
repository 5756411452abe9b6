"""Whatever JSON a row holds, it is rendered, or refused with a sentence: no task and no reader fails on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from finetune_api.spec import Dataset
from finetune_api.traits import USUAL_COLUMNS, Task
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.render import Rendering
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import scan
from finetune_trainer.prepare.rendering import Renderer, RowRequest
from finetune_trainer.prepare.scan import open_reader, scan_all
from finetune_trainer.prepare.sources import open_path
from finetune_trainer.prepare.workers import Workers

WORDS = st.sampled_from(
    ["", " ", "a", "B", "1", "[]", '["a"]', "{'a': array(['x'])}", "A. x", "user", "assistant", "<|im_end|>"]
)
KEYS = st.sampled_from(["text", "label", "value", "aliases", "role", "content", "from", "answer", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | WORDS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


def rows_of(task: Task) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows with the task's columns, some of them missing or called otherwise, that hold anything."""
    roles = task.traits.columns
    names = st.tuples(*(st.sampled_from(USUAL_COLUMNS[role][:2]) for role in roles))
    row = names.flatmap(lambda columns: st.fixed_dictionaries(dict.fromkeys(columns, VALUES)))
    return st.lists(row | st.dictionaries(st.sampled_from(roles), VALUES), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat(AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(autouse=True)
def _all_rows_may_be_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_BAD_SHARE", 1.0)


@pytest.mark.parametrize("task", Task)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_row_of_any_json_is_rendered_or_refused_with_a_sentence(
    tmp_path: Path, chat: ChatFormat, task: Task, data: st.DataObject
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data.draw(rows_of(task))))
    refusal = ""
    try:
        reader = open_reader(Dataset(name="d", path=str(path), task=task), 0, open_path(path, "d", None, "datasets[0]"))
        with Workers(1) as workers:
            [(_, scans)] = scan_all([reader], 1, workers)
    except TrainerError as refused:
        refusal = str(refused)
    if refusal:
        assert refusal.endswith((".", "…"))
        return
    found = scans["train"]
    rendering = Rendering(task, chat, 300, labels=tuple(sorted(set(found.labels))))
    requests = [RowRequest(row, "train", True) for row in reader.rows(found.split, set(found.rows))]
    outcome = Renderer(reader, found.split, rendering, 10, None)(requests)
    assert len(found.cluster) == len(found.rows)
    assert len(set(outcome.train.rows)) + outcome.written.bad.count == len(found.rows)
    assert all(": " in reason for reason in (*found.bad.first, *outcome.written.bad.first))
