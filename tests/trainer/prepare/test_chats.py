"""Chats in Prepare and preview: what was not rendered as it stands is counted, what cannot be trained is named."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tests.support.chat_templates import FAMILIES
from tests.support.prepare_runs import prepare_context, write_rows
from tests.support.tiny import tiny_llama
from transformers import AutoTokenizer

from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.encoding import TextEncoder
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import preview, stage

THINKS = "<think>\nTwice {0}.\n</think>\n\n{1}"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16)
    return tmp_path


def spec_of(path: str, family: str, **dataset: Any) -> dict[str, Any]:
    model = {"path": "tiny", "chatTemplate": FAMILIES[family].template}
    return {"model": model, "datasets": [{"name": "chats", "path": path, "task": "chat"} | dataset]}


def prepared(work: Path, path: str, family: str) -> tuple[list[str], list[str]]:
    """(the texts of the training documents, the notes)."""
    context = prepare_context(work, spec_of(path, family))
    stage.run(context)
    tokenizer = AutoTokenizer.from_pretrained(context.prepared / "tokenizer")
    [facts] = context.reporter.report.datasets
    return [tokenizer.decode(document.ids) for document in DocumentStore(context.prepared / "train")], facts.notes


def shown(work: Path, path: str, family: str) -> str:
    out = io.StringIO()
    preview.run(prepare_context(work, spec_of(path, family)), Console(file=out, width=200))
    return out.getvalue()


def turns(i: int, *said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text.format(i, 2 * i)} for k, text in enumerate(said)]


def test_the_report_counts_what_is_not_rendered_and_whose_tokens_were_compared(work: Path) -> None:
    rows = [
        {"messages": turns(i, "What is {0}+{0}?", THINKS, "Sure of {0}?", "Yes, {1}.", "Thanks")} for i in range(40)
    ]
    write_rows(work / "rows.jsonl", rows)
    texts, notes = prepared(work, "rows.jsonl", "qwen 3")
    assert (
        sum(bool(re.search(r"<think>\nTwice \d+\.\n</think>\n\n\d+<\|im_end\|>$", text)) for text in texts)
        == len(texts) / 2
    )
    assert "the chat template drops thoughts of earlier turns: 36 rows" in notes
    assert "messages after the last answer are left out: 36 rows" in notes
    assert "72 of 72 documents have exactly the tokens of the chat template" in notes


def test_calls_in_parquet_have_only_their_own_arguments(work: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        arguments = {"town": f"Bern {i}"} if i % 2 else {"day": i}
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": f"Weather {i}?"}, answer]}

    pq.write_table(pa.Table.from_pylist([row(i) for i in range(40)]), work / "rows.parquet")
    texts, notes = prepared(work, "rows.parquet", "qwen 2.5")
    calls = [re.search(r'"arguments": \{"(town": "Bern \d+"|day": \d+)\}\}', text) for text in texts]
    assert all(calls)
    assert "36 of 36 documents have exactly the tokens of the chat template" in notes


def test_rows_that_a_template_cannot_write_whole_are_refused_with_the_message_and_what_to_do(work: Path) -> None:
    rows = [{"messages": turns(i, "What is {0}+{0}?", THINKS)} for i in range(40)]
    write_rows(work / "rows.jsonl", rows)
    with pytest.raises(
        TrainerError, match=r"leaves out the thought of the assistant message 2 .*set model\.chatTemplate"
    ):
        prepared(work, "rows.jsonl", "deepseek r1")
    assert "cannot be used: the chat template leaves out the thought of the assistant message 2" in shown(
        work, "rows.jsonl", "deepseek r1"
    )


def test_preview_says_of_its_rows_what_is_not_rendered(work: Path) -> None:
    write_rows(work / "rows.jsonl", [{"messages": turns(i, "Is {0} <|im_end|>?", "Yes")} for i in range(40)])
    assert (
        shown(work, "rows.jsonl", "chatml").count("the special token <|im_end|> stands in messages, and is plain") == 3
    )


def test_tokens_that_are_not_the_template_s_stop_the_job_and_name_the_row(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(work / "rows.jsonl", [{"messages": turns(i, "{0}?", "Yes, {1}")} for i in range(40)])
    monkeypatch.setattr(TextEncoder, "split_ids", lambda self, texts: None)
    monkeypatch.setattr(TextEncoder, "separate_ids", lambda self, texts: [])
    ids = TextEncoder.ids
    monkeypatch.setattr(TextEncoder, "ids", lambda self, text, before="": ids(self, text, before)[::-1])
    with pytest.raises(TrainerError, match=r"Row \d+ of chats cannot be trained on: its tokens are not those"):
        prepared(work, "rows.jsonl", "chatml")


def test_a_chat_in_a_csv_is_read_from_its_json_text(work: Path) -> None:
    lines = [json.dumps(json.dumps(turns(i, "{0}?", "Yes, {1}"))).replace('\\"', '""') for i in range(40)]
    (work / "rows.csv").write_text("messages\n" + "\n".join(lines) + "\n")
    assert "Yes, 14" in "".join(prepared(work, "rows.csv", "chatml")[0])
