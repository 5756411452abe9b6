"""Weights & Biases from rank 0, in a thread of its own: slow, unreachable or broken, it never holds the training."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune_trainer.failures import redact

INIT_SECONDS = 60
FINISH_SECONDS = 60.0
MOST_PENDING = 100_000
"""Rows that wait for a tracker that does not answer; newer ones are dropped."""

VALIDATION_COLUMNS = ("train/step", "validation/loss", "validation/accuracy")
"""The table that stands beside the curves: every validation of this attempt."""


class Tracker(Protocol):
    """Where curves go."""

    url: str
    """Page of the run, once it is known."""
    problem: str
    """Why nothing arrives there, in a sentence; empty while all is well."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Add values at an optimiser step."""

    def finish(self) -> None:
        """Send what is left, within a limited time."""


class NoTracker:
    """Tracks nothing."""

    url = ""
    problem = ""

    def log(self, values: dict[str, float], step: int) -> None:
        """Drop the values."""

    def finish(self) -> None:
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
        self._rows: queue.Queue[dict[str, float] | None] = queue.Queue(MOST_PENDING)
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
                self.problem = f"W&B has not taken anything for {MOST_PENDING} rows; the curves there end."

    def finish(self, timeout_seconds: float | None = None) -> None:
        """Send what is left; after the time-out (FINISH_SECONDS) it is left behind."""
        timeout_seconds = FINISH_SECONDS if timeout_seconds is None else timeout_seconds
        if self._thread.is_alive() and not self.problem:
            self._rows.put(None)
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                self.problem = f"W&B did not take the last rows within {timeout_seconds:.0f} s."

    def _send(self) -> None:
        try:
            import wandb

            settings = wandb.Settings(**self._arguments.pop("settings"))
            run = wandb.init(**self._arguments, settings=settings)
            run.define_metric("train/step")
            run.define_metric("*", step_metric="train/step")
            self.url = run.url or ""
            validations = []
            while (row := self._rows.get()) is not None:
                run.log(row)
                if VALIDATION_COLUMNS[1] in row:
                    validations.append([row.get(name) for name in VALIDATION_COLUMNS])
            if validations:
                table = wandb.Table(columns=list(VALIDATION_COLUMNS), data=validations)
                run.log({"validation/table": table, VALIDATION_COLUMNS[0]: validations[-1][0]})
            run.finish()
        except BaseException as error:  # whatever it is, training goes on
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.problem = f"W&B is not reached, training goes on without: {redact(first)}"
