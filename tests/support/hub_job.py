"""A small job whose model and rows are on the Hub, as the tests of Prepare play it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.prepare_runs import labelled
from tests.support.tiny import tiny_llama

ROWS = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in labelled(40))
SPEC: dict[str, Any] = {
    "model": {"repo": "meta/tiny"},
    "datasets": [{"name": "rows", "repo": "acme/rows", "task": "classification"}],
}


def tiny_model(directory: Path) -> Path:
    """The model of `meta/tiny`."""
    return tiny_llama(directory / "tiny", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16)
