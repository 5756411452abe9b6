"""The input of a view: the resource, the curves, the time. No files, no cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api.base import Stage
from finetune_api.report import Progress
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AttemptRecord, JobStatus


@dataclass
class History:
    """Training curves by step; a step repeated after a resume counts once, with its last value."""

    loss: dict[int, float] = field(default_factory=dict)
    validation: dict[int, dict[str, float]] = field(default_factory=dict)
    learning_rate: float | None = None

    def add_rows(self, rows: Iterable[str]) -> None:
        """Add lines of `metrics/train.jsonl`; invalid lines are skipped."""
        for line in rows:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if isinstance(row.get("loss"), int | float):
            self.loss[step] = float(row["loss"])
        if isinstance(row.get("learningRate"), int | float):
            self.learning_rate = float(row["learningRate"])
        if isinstance(row.get("validation"), dict):
            known = {name: float(value) for name, value in row["validation"].items() if isinstance(value, int | float)}
            self.validation[step] = known

    def add_progress(self, progress: Progress | None) -> None:
        """Add the progress of a status, for jobs without a metrics file: as coarse as the status is written."""
        if progress is not None and progress.loss is not None:
            self.loss[progress.step] = progress.loss
            self.learning_rate = progress.learning_rate


@dataclass(frozen=True)
class Scene:
    """One moment of one job."""

    name: str
    spec: FineTuneJobSpec
    status: JobStatus
    now: datetime
    history: History = field(default_factory=History)
    run: str = ""
    """Run directory, if it is on this machine."""
    notes: tuple[str, ...] = ()
    """Sentences of the command that shows the job, in addition to the job's own warnings."""

    def attempts(self, stage: Stage) -> list[AttemptRecord]:
        """The attempts of a stage, oldest first."""
        return [record for record in self.status.attempts if record.stage is stage]

    def seconds(self, stage: Stage) -> float | None:
        """Running time of the stage, summed over its attempts; None before the first."""
        records = self.attempts(stage)
        if not records:
            return None
        return sum(max(0.0, ((record.ended or self.now) - record.started).total_seconds()) for record in records)
