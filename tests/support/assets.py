"""Real models and text for tests: fetched once by package name, shared with the examples."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


@cache
def _fetcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_assets", EXAMPLES / "fetch_assets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["fetch_assets"] = module
    spec.loader.exec_module(module)
    return module


def fetch(name: str) -> Path:
    """Path of one asset of `examples/fetch_assets.py`."""
    path: Path = _fetcher().fetch(name)
    return path


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return fetch("smollm2")


def tweets_csv() -> Path:
    """38,158 tweets with three sentiments (columns text, sentiment)."""
    return fetch("tweets")


def commonsense_jsonl() -> Path:
    """1,221 five-way questions (question, choices, answer)."""
    return fetch("commonsense")


def piqa_jsonl() -> Path:
    """1,500 two-way questions (question, choices, answer)."""
    return fetch("piqa")


def chitchat_jsonl() -> Path:
    """Chats between two people, as messages with roles."""
    return fetch("chitchat")


def minilm_directory() -> Path:
    """A six-layer sentence encoder."""
    return fetch("minilm")


def smollm2_directory() -> Path:
    """SmolLM2 converted to safetensors by Prepare's own converter, once."""
    from finetune_trainer.prepare.gguf import convert

    directory: Path = convert(smollm2_gguf(), _fetcher().cache_directory() / "models")
    return directory
