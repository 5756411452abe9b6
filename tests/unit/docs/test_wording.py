"""What people read is plain technical English: the slips that came up most often do not come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.crd import root_schema
from finetune_operator.cli import COMMANDS, load

ROOT = Path(__file__).parents[3]
UNIT = r"(?:rank|step|GPU|node|row|token|pod|process|epoch|layer|document|second|hour|machine|core)"
COUNTED = (
    r"(?:memory|bytes|[KMGT]i?B|tokens|examples|rows|documents|steps|GPUs|microseconds|µs|ms|"
    r"micro-batches|layers|FLOPs|operations)"
)
SLIPS = {
    rf"\b{COUNTED} an? {UNIT}\b": "per, as in tokens per step",
    rf"\ban? {UNIT} and (?:step|row|rank|pass|process)\b": "per GPU and step",
    r"\bgo(?:es|ing)? on\b(?! (?:GPUs|this))": "continue, resume",
    r"\bso many times\b": "speed-up, or times as fast",
    r"\b[Ww]hoever\b": "users who, anyone who",
    r"\b(?:he|his|him)\b": "you, they, or the passive",
    r"\blearnt\b": "trained on, in the loss",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b[Mm]ain memory\b": "host memory",
    r"\bshall\b": "must, or the present tense",
    r"\bhow-manieth\b": "number of",
    r"\bsaid otherwise\b|\bsays otherwise\b": "unless you set",
    r"\b(?:stands|stand) in the (?:report|status)\b": "the report has",
    r"\bIs it well\b": "Verify",
}
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("**/*.md"),
        *(ROOT / "tests").glob("*/README.md"),
        *(ROOT / "charts").glob("*/README.md"),
        *(ROOT / "charts").glob("*/values.yaml"),
        *(ROOT / "charts").glob("*/templates/*"),
        *(ROOT / "charts").glob("*/files/*"),
        *(ROOT / "images").glob("**/Containerfile"),
        *(ROOT / "examples").glob("*.yaml"),
    }
    - {ROOT / "docs" / "code-map.md"}  # docstrings: for those who read the code
)


def slips(text: str) -> list[str]:
    """Each slip with the words around it and what to write instead."""
    plain = " ".join(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split())
    return [
        f"…{plain[max(0, found.start() - 30) : found.end() + 30]}…: {instead}"
        for pattern, instead in SLIPS.items()
        for found in re.finditer(pattern, plain)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_plain_english(page: Path) -> None:
    assert slips(page.read_text(encoding="utf-8")) == []


def sentences(schema: Any) -> Iterator[str]:
    """Every description and message in a schema."""
    if isinstance(schema, dict):
        yield from (text for key, text in schema.items() if key in ("description", "message") and isinstance(text, str))
        for below in schema.values():
            yield from sentences(below)
    elif isinstance(schema, list):
        for below in schema:
            yield from sentences(below)


def test_descriptions_and_messages_of_the_api_are_in_plain_english() -> None:
    found = list(sentences(root_schema()))
    assert len(found) > 300
    assert [slip for sentence in found for slip in slips(sentence)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_commands_is_in_plain_english(name: str) -> None:
    command = load(name)
    texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    assert [slip for text in texts for slip in slips(text or "")] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "2,317 tokens a GPU and step",
        "memory a rank at the peak",
        "the job goes on from the newest checkpoint",
        "Whoever may create jobs",
        "tokens that are learnt",
        "what somebody else has to mend",
    ],
)
def test_the_old_idiom_is_noticed(sentence: str) -> None:
    assert slips(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "2,317 tokens per GPU and step",
        "a GPU and a node",
        "the pod requests a GPU",
        "resumes a step later",
        "recommended",
    ],
)
def test_plain_sentences_pass(sentence: str) -> None:
    assert slips(sentence) == []
