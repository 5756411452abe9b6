"""Held-out rows as Evaluate reads them: rendered and tokenised by the function that rendered the training rows.

`prepared/evaluation/<dataset>.jsonl` holds one `EvaluationRow` a line, `prepared/baseline/<dataset>.jsonl` one
`BaselineRow` a line (classification only: what the TF-IDF baselines are fitted on).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One held-out row.

    Closed answers (classification, multiple choice): `prompt_ids`, `candidate_ids` each with the end token, `gold`.
    Free answers (question answering, summarisation): `prompt_ids`, `answers`.
    Likelihood only (chat, text): `ids`, `target_position`, `target_id` as in `StoredDocument`.
    """

    id: str
    """`<dataset>/<row number in the source>`."""
    dataset: str
    task: str
    prompt: str = ""
    """The prompt as the model sees it."""
    prompt_ids: list[int] = field(default_factory=list)
    candidates: list[str] | None = None
    candidate_ids: list[list[int]] | None = None
    gold: int | None = None
    """Index of the right candidate."""
    answers: list[str] = field(default_factory=list)
    """Every answer that counts as right."""
    text: str = ""
    """The raw input without prompt."""
    ids: list[int] = field(default_factory=list)
    target_position: list[int] = field(default_factory=list)
    target_id: list[int] = field(default_factory=list)
    few_shot_prompt_ids: list[int] | None = None
    """The same prompt after `evaluation.fewShot` solved examples from train; absent where none were asked for."""


@dataclass(frozen=True, slots=True)
class BaselineRow:
    """One labelled text for the TF-IDF baselines; never a held-out one."""

    text: str
    label: str
    used: bool
    """Whether the model is trained on it; false for rows that `maxRows` left out."""


def json_line(row: EvaluationRow | BaselineRow) -> str:
    """The row as a JSON object with the end of its line, without fields that hold nothing."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    kept: dict[str, Any] = {name: value for name, value in values.items() if value not in (None, [], "")}
    return json.dumps(kept, ensure_ascii=False) + "\n"


def read_evaluation(path: Path) -> Iterator[EvaluationRow]:
    """The rows of one `evaluation/<dataset>.jsonl`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield EvaluationRow(**json.loads(line))


def read_baseline(path: Path) -> Iterator[BaselineRow]:
    """The rows of one `baseline/<dataset>.jsonl`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield BaselineRow(**({"text": "", "label": ""} | json.loads(line)))
