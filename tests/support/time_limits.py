"""Time limits of tests, which grow with the machine: written for a free machine of the usual speed, longer elsewhere.

How slow the machine is, is measured once per session and handed to workers and child processes in a variable of the
environment, which can also be set by hand. How busy it is, is asked whenever a limit is needed.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

SLOWNESS_VARIABLE = "FINETUNE_TEST_SLOWNESS"
INTERPRETER_SECONDS, PRODUCT_SECONDS = 0.03, 0.014
"""CPU seconds of the two measurements on the machine for which the limits were written (a 2-core EPYC with AVX-512)."""


MOST_LOAD = 10.0
"""Processes per core for which limits grow: beyond it, a test that hangs would hold a worker for hours."""


def scaled(seconds: float) -> float:
    """The limit that stands for so many seconds on a free machine of the usual speed; never shorter than that."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return seconds * slowness() * min(max(1.0, load), MOST_LOAD)


@functools.cache
def slowness() -> float:
    """How many times slower than usual a core of this machine is, at least 1."""
    if SLOWNESS_VARIABLE not in os.environ:
        measured = max(_cpu_seconds(_interpret) / INTERPRETER_SECONDS, _cpu_seconds(_multiply) / PRODUCT_SECONDS)
        os.environ[SLOWNESS_VARIABLE] = f"{max(1.0, measured):.2f}"
    return float(os.environ[SLOWNESS_VARIABLE])


def _cpu_seconds(work: Callable[[], None]) -> float:
    """The least of three, so that neither a cold cache nor a neighbour on the same core counts."""
    taken = []
    for _ in range(3):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)


def _interpret() -> None:
    sum(number * number & 0xFF for number in range(400_000))


def _multiply() -> None:
    import numpy as np

    matrix = np.ones((512, 512), np.float32)
    for _ in range(4):
        matrix @ matrix
