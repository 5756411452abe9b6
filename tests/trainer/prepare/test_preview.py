"""`finetune preview` shows what the model will see and marks what it learns."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.support.prepare_runs import labelled, prepare_context, write_rows
from tests.support.tiny import tiny_llama

from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import preview


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16)
    write_rows(tmp_path / "rows.jsonl", labelled(40))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    write_rows(
        tmp_path / "chats.jsonl",
        [{"messages": [*chat, {**chat[0], "content": f"More {i}"}, chat[1]]} for i in range(20)],
    )
    return tmp_path


def shown(work: Path, *, colours: bool = False) -> str:
    spec = {
        "datasets": [
            {"name": "d", "path": "rows.jsonl", "task": "classification"},
            {"name": "chats", "path": "chats.jsonl", "task": "chat"},
        ]
    }
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=colours, color_system="standard" if colours else None)
    preview.run(prepare_context(work, spec), console)
    return out.getvalue()


def test_three_examples_of_each_dataset_are_shown_with_what_is_learnt(work: Path) -> None:
    text = shown(work)
    assert text.count("│ Classify the text. Answer with one of: bad, good.") == 3
    assert text.count("⟦Hello.<|im_end|>⟧") == 6
    assert "d: classification" in text
    assert "32 rows for training, 4 for validation, 4 for evaluation (unseen half of validation)" in text
    assert not (work / "run" / "prepared").exists()


def test_on_a_terminal_learnt_tokens_are_coloured_and_not_bracketed(work: Path) -> None:
    text = shown(work, colours=True)
    assert "\x1b[1;32mHello.<|im_end|>\x1b[0m" in text
    assert "⟦" not in text


def test_preview_refuses_what_prepare_would_refuse(work: Path) -> None:
    write_rows(work / "rows.jsonl", [{"txt": "a", "label": "b"}])
    with pytest.raises(TrainerError, match="d has no column with a usual name for text"):
        shown(work)
