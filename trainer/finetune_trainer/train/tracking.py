"""Weights & Biases from rank 0, in a thread of its own: slow, unreachable or broken, it never delays training.

Only Train has the key, so the evaluation in W&B is that of Train: the validations by dataset, and in the run's
summary those of the exported weights. The comparison with the base model is Evaluate's page.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune_trainer.failures import redact

INIT_SECONDS = 60
FINISH_SECONDS = 60.0
MOST_PENDING = 100_000
"""Rows kept for a tracker that does not respond; newer ones are dropped."""

EVALUATION_COLUMNS = ("train/step", "exported", "dataset", "documents", "loss", "accuracy")


@dataclass(frozen=True)
class TrackedEvaluation:
    """The validations of all attempts."""

    table: list[list[Any]]
    """One row per validation and dataset, with EVALUATION_COLUMNS."""
    summary: dict[str, float]
    """Of the exported weights: `exported/<dataset>/accuracy` and the like."""


def evaluation_of(rows: Sequence[Mapping[str, Any]], exported: int) -> TrackedEvaluation:
    """From the rows of the curve, and the step whose weights were exported."""
    table: list[list[Any]] = []
    summary: dict[str, float] = {"exported/step": exported}
    for row in rows:
        seen = row.get("validation") or {}
        for name, of in (seen.get("datasets") or {}).items():
            chosen = row["step"] == exported
            table.append([row["step"], chosen, name, of["documents"], of["loss"], of["accuracy"]])
            if chosen:
                summary |= {f"exported/{name}/{key}": of[key] for key in ("loss", "accuracy")}
    return TrackedEvaluation(table, summary)


class Tracker(Protocol):
    """Where curves go."""

    url: str
    """Page of the run, once it is known."""
    problem: str
    """Why nothing arrives there, as a sentence; empty if there is no problem."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Add values at an optimiser step."""

    def finish(self, evaluation: TrackedEvaluation) -> None:
        """Send what is left, the evaluation last, within a limited time."""


class NoTracker:
    """Tracks nothing."""

    url = ""
    problem = ""

    def log(self, values: dict[str, float], step: int) -> None:
        """Drop the values."""

    def finish(self, evaluation: TrackedEvaluation) -> None:
        """Nothing is left."""


class WandbTracker:
    """One run for all attempts of a job: its id is the job's uid; `train/step` is the axis of every curve."""

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        mode: Literal["online", "offline", "disabled"],
        run_id: str,
        name: str,
        config: dict[str, Any],
        directory: Path,
        api_key: str | None,
        init_seconds: int = INIT_SECONDS,
    ) -> None:
        self.url = ""
        self.problem = ""
        self._rows: queue.Queue[dict[str, float] | TrackedEvaluation] = queue.Queue(MOST_PENDING)
        directory.mkdir(parents=True, exist_ok=True)
        self._arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "mode": mode,
            "id": run_id,
            "name": name,
            "resume": "allow",
            "config": config,
            "dir": str(directory),
            "settings": {
                "api_key": api_key,
                "init_timeout": init_seconds,
                "silent": True,
                "console": "off",
                "disable_git": True,
                "disable_code": True,
            },
        }
        self._thread = threading.Thread(target=self._send, daemon=True, name="wandb")
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> None:
        """Add values at an optimiser step; returns at once."""
        if not self.problem:
            try:
                self._rows.put_nowait({**values, "train/step": step})
            except queue.Full:
                self.problem = f"W&B has not accepted data for {MOST_PENDING:,} rows; its curves end here."

    def finish(self, evaluation: TrackedEvaluation, timeout_seconds: float | None = None) -> None:
        """Send what is left; after the timeout (FINISH_SECONDS) it is dropped."""
        timeout_seconds = FINISH_SECONDS if timeout_seconds is None else timeout_seconds
        if self._thread.is_alive() and not self.problem:
            self._rows.put(evaluation)
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                self.problem = f"W&B did not accept the last rows within {timeout_seconds:.0f} s."

    def _send(self) -> None:
        try:
            import wandb

            settings = wandb.Settings(**self._arguments.pop("settings"))
            run = wandb.init(**self._arguments, settings=settings)
            run.define_metric("train/step")
            run.define_metric("*", step_metric="train/step")
            self.url = run.url or ""
            while not isinstance(row := self._rows.get(), TrackedEvaluation):
                run.log(row)
            if row.table:
                run.log({"evaluation": wandb.Table(columns=list(EVALUATION_COLUMNS), data=row.table)})
            run.summary.update(row.summary)
            run.finish()
        except BaseException as error:  # training continues whatever it is
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.problem = f"W&B cannot be used, training continues without it: {redact(first)}"
