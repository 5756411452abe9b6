"""Notices that training makes no progress, writes the stack of every thread, and names the rank that is to blame.

A thread of each rank writes a heartbeat to the volume. A stopped rank writes none; a rank that is stuck elsewhere
is behind the others, which wait for it in a collective.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune_api.files import write_json

log = logging.getLogger(__name__)

BACKSTOP_SECONDS = 60.0
"""So much later the interpreter ends the process itself, even if no Python thread runs any more."""


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank was when it wrote this."""

    step: int
    phase: int
    """Counts the marks within the step: the rank with the lowest number is behind."""
    activity: str
    time: float
    """Unix time."""


class Watchdog:
    """Watches this rank's progress. `on_hang` is called with a sentence and must end the process."""

    def __init__(
        self, logs: Path, rank: int, world_size: int, hang_seconds: float, on_hang: Callable[[str], None]
    ) -> None:
        self._logs, self._rank, self._world_size, self._on_hang = logs, rank, world_size, on_hang
        self._interval = min(10.0, max(0.2, hang_seconds / 10))
        self._step, self._phase, self._activity = 0, 0, "starting"
        self._since, self._budget = time.monotonic(), float("inf")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        logs.mkdir(parents=True, exist_ok=True)
        self._stacks = (logs / f"stacks-rank{rank}.txt").open("w", encoding="utf-8")

    def start(self) -> None:
        """Start watching. A rank that aborts or crashes (SIGABRT, SIGSEGV) leaves its stacks too."""
        faulthandler.enable(self._stacks)
        self._write_heartbeat()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def expect(self, activity: str, budget_seconds: float, step: int | None = None) -> None:
        """A new piece of work starts, which must finish within the budget."""
        self._step = self._step if step is None else step
        self._phase, self._activity = 0, activity
        self._since, self._budget = time.monotonic(), budget_seconds
        faulthandler.dump_traceback_later(budget_seconds + BACKSTOP_SECONDS, exit=True, file=self._stacks)

    def mark(self, activity: str) -> None:
        """The same piece of work has reached its next part; the budget stays the same."""
        self._phase, self._activity = self._phase + 1, activity

    # --- the thread ---

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._write_heartbeat()
            if time.monotonic() - self._since > self._budget:
                self._report_hang()

    def _write_heartbeat(self) -> None:
        beat = Heartbeat(self._step, self._phase, self._activity, time.time())
        try:
            write_json(heartbeat_file(self._logs, self._rank), asdict(beat))
        except OSError as error:
            log.warning("The heartbeat could not be written: %s", error)

    def _report_hang(self) -> None:
        budget = self._budget
        for file in (self._stacks, sys.stderr):
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.flush()
        time.sleep(2 * self._interval)  # the other ranks write their heartbeats and stacks within this time
        beats = read_heartbeats(self._logs, self._world_size)
        what = "No progress for"
        if not (self._step or self._phase):
            what = f"{self._activity[0].upper()}{self._activity[1:]} took over"
        self._on_hang(f"{what} {budget:.0f} s. {who_is_missing(beats, 4 * self._interval, time.time())}")


def heartbeat_file(logs: Path, rank: int) -> Path:
    """Where a rank writes its heartbeat."""
    return logs / f"heartbeat-rank{rank}.json"


def read_heartbeats(logs: Path, world_size: int) -> dict[int, Heartbeat | None]:
    """The newest heartbeat of each rank; None if there is none."""
    beats: dict[int, Heartbeat | None] = {}
    for rank in range(world_size):
        try:
            beats[rank] = Heartbeat(**json.loads(heartbeat_file(logs, rank).read_text()))
        except (OSError, ValueError, TypeError):
            beats[rank] = None
    return beats


def who_is_missing(beats: dict[int, Heartbeat | None], stale_seconds: float, now: float) -> str:
    """A sentence that names the rank for which the others wait."""
    silent = {r: b for r, b in beats.items() if b is None or now - b.time > stale_seconds}
    if silent and len(silent) < len(beats):
        rank, beat = min(silent.items(), key=lambda item: item[1].time if item[1] else 0.0)
        last = f"its last heartbeat was {now - beat.time:.0f} s ago, {_place(beat)}" if beat else ""
        return f"Rank {rank} is not responding; {last or 'it has never sent a heartbeat'}."
    known = {r: b for r, b in beats.items() if b is not None}
    if len({(b.step, b.phase) for b in known.values()}) > 1:
        rank, beat = min(known.items(), key=lambda item: (item[1].step, item[1].phase))
        others = max(known.values(), key=lambda b: (b.step, b.phase))
        return f"Rank {rank} is behind: {_place(beat)}, others {_place(others)}."
    if not known:
        return "No rank has sent a heartbeat; see their stack traces."
    return f"All ranks are at the same place, {_place(next(iter(known.values())))}; see their stack traces."


def _place(beat: Heartbeat) -> str:
    return f"in step {beat.step} ({beat.activity})" if beat.step else beat.activity
