"""Training curves on the volume, and the speed of training."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.reports import read_metrics

RECENT_STEPS = 20


class MetricsFile:
    """One JSON object per line; every step once, however often it was repeated after failures."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, which will be written again, and a line that a crash cut off."""
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return
        kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
        aside = self._path.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self._path)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, those of earlier attempts too."""
        return read_metrics(self._path)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row. Values that are not finite become null, which every reader of JSON takes."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Throughput:
    """Tokens per second and seconds per step over the newest steps of this attempt."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)], maxlen=RECENT_STEPS + 1)

    def restart(self) -> None:
        """Do not count the time since the last step, in which something else was done."""
        self._steps.clear()
        self._steps.append((self._clock(), 0, 0))

    def step(self, tokens: int, computed: int) -> None:
        """A step of `tokens` tokens (without padding, over all ranks) has ended; shared prefixes are computed once."""
        self._steps.append((self._clock(), tokens, computed))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the examples over the newest steps; None before the first."""
        return self._rate(sum(tokens for _, tokens, _ in list(self._steps)[1:]))

    @property
    def computed_tokens_per_second(self) -> float | None:
        """Tokens that were computed over the newest steps; None before the first."""
        return self._rate(sum(computed for _, _, computed in list(self._steps)[1:]))

    def _rate(self, tokens: int) -> float | None:
        return tokens / self._seconds if self._seconds else None

    @property
    def seconds_per_step(self) -> float | None:
        """Over the newest steps; None before the first."""
        return self._seconds / (len(self._steps) - 1) if self._seconds else None

    @property
    def _seconds(self) -> float:
        return self._steps[-1][0] - self._steps[0][0]
