"""Real models and text for tests: fetched once by package name, shared with the examples."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

from tests.support.scripts import load_script


@cache
def _fetcher() -> ModuleType:
    return load_script("examples/fetch_assets.py", "fetch_assets")


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
