"""The side of a measured process: it works step by step, each step when it is told to.

Imported in environments that hold nothing of this project: the standard library only. The first step, which warms
up, is done unasked; from then on a line on standard input is one step, its end ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

REPORT_VARIABLE = "BENCHMARK_REPORT"
"""Number of the file descriptor for reports: standard output belongs to the libraries."""


class Pace:
    """Tells of every step and waits for the next."""

    def __init__(self) -> None:
        self._report = os.fdopen(int(os.environ[REPORT_VARIABLE]), "w")
        self._restart()

    def _restart(self) -> None:
        self._cpu, self._begun = _cpu_seconds(), time.perf_counter()
        self._used: dict[str, float] = {}

    def ended(self) -> None:
        """The step has ended: what follows until it is reported is not counted."""
        self._used = {"seconds": time.perf_counter() - self._begun, "cpuSeconds": _cpu_seconds() - self._cpu}

    def step(self, **figures: Any) -> None:
        """Report a step with its time since it was asked for, and wait to be asked again."""
        if not self._used:
            self.ended()
        self.tell(**figures, **self._used, peakMegabytes=_peak_megabytes())
        if not sys.stdin.readline():
            # The thing under measurement is in the middle of a run: nothing of it need be put away.
            os._exit(0)
        self._restart()

    def tell(self, **figures: Any) -> None:
        """Report without waiting."""
        self._report.write(json.dumps(figures) + "\n")
        self._report.flush()


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
