"""Measured processes under control: several are alive, one works at a time, in turn."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.pace import REPORT_VARIABLE

ROOT = Path(__file__).parent.parent
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "WANDB_MODE": "disabled",
}


class WorkerError(RuntimeError):
    """A measured process ended or said nothing; the text is the end of its log."""


class Worker:
    """A process that uses `Pace`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        python: Path | str = sys.executable,
        environment: Mapping[str, str] = {},
        seconds: float = 600,
    ) -> None:
        """Start `python -m module arguments`. `seconds` is the patience with each step."""
        self._patience = seconds
        self._buffer = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._report, theirs = os.pipe()
        self._process = subprocess.Popen(
            [str(python), "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **QUIET, **environment, REPORT_VARIABLE: str(theirs)},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs,),
        )
        os.close(theirs)

    def step(self) -> dict[str, Any]:
        """Have it do a step; its report."""
        self.go()
        return self.report()

    def go(self) -> None:
        """Have it do a step, without waiting."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None

    def report(self) -> dict[str, Any]:
        """The next report: the first is that of the warm-up step."""
        deadline = time.monotonic() + self._patience
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._report], [], [], left)[0]:
                raise WorkerError(f"no step in {self._patience} s\n{self._last_words()}")
            got = os.read(self._report, 65536)
            if not got:
                self._process.wait()
                raise WorkerError(self._last_words())
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-25:])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._log.close()
        os.close(self._report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def start_all(stack: ExitStack, workers: Mapping[str, Worker]) -> dict[str, dict[str, Any]]:
    """Wait for the warm-up step of all of them, which `stack` will end; their reports."""
    for worker in workers.values():
        stack.enter_context(worker)
    return {name: worker.report() for name, worker in workers.items()}


def rounds(workers: Mapping[str, Worker], count: int, warm_up: int = 1) -> dict[str, list[dict[str, Any]]]:
    """`count` steps of each worker, in turn; `warm_up` further ones before are not kept."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    names = list(workers)
    for number in range(-warm_up, count):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found = workers[name].step()
            if number >= 0:
                samples[name].append(found)
    return samples
