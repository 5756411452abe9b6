"""Reports of earlier stages in the run directory: what the proof and the model card are written from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.base import STAGES, Stage
from finetune_api.report import Report

RESULTS_FILE = "results.json"
"""In `evaluation/`."""
_NAME = re.compile(rf"({'|'.join(STAGES)})-(\d+)\.json")


def read_reports(directory: Path) -> list[tuple[int, Report]]:
    """(attempt number, report) of every attempt, in the order of stages and attempts. Unreadable ones are left out."""
    found = []
    for path in directory.glob("*.json"):
        name = _NAME.fullmatch(path.name)
        if name is None:
            continue
        try:
            found.append((int(name[2]), Report.model_validate_json(path.read_text())))
        except (OSError, ValidationError):
            continue
    return sorted(found, key=lambda item: (STAGES.index(item[1].stage), item[0]))


def newest_done(reports: list[tuple[int, Report]], stage: Stage) -> Report | None:
    """The last report of a stage that succeeded."""
    done = [report for _, report in reports if report.stage is stage and report.done]
    return done[-1] if done else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of `metrics/train.jsonl`; a line cut by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
