"""Three ways to follow a job: a live screen, plain lines, JSON lines. All receive the same scenes and events."""

from __future__ import annotations

import contextlib
import json
import sys
import termios
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live

from finetune_api.status import ConditionType
from finetune_operator.view import live
from finetune_operator.view.results import render_end
from finetune_operator.view.scene import Scene
from finetune_operator.view.words import amount, count, duration, measure, printable

LINE_SECONDS = 20.0
"""Between two lines of progress where there is no terminal."""
ACTIVITY_SECONDS = 3.0
QUIET_ACTIVITIES = ("", "training", "done", "failed")
"""Shown by an event, or by the progress line."""
QUIET_EVENTS = ("AttemptStarted", "Ending", "WaitingForPreviousAttempt")
"""Shown in other ways, or of no use to a reader."""


class Output:
    """Something that shows a job; used in a `with` block that ends with the job's last scene shown."""

    def __enter__(self) -> Self:
        """Begin to show."""
        return self

    def __exit__(self, *_: object) -> None:
        """End; what was shown last stays on the screen."""

    def scene(self, scene: Scene) -> None:
        """The newest state; called often, shows only what changed."""

    def event(self, kind: str, reason: str, message: str) -> None:
        """A transition."""

    def note(self, sentence: str) -> None:
        """A sentence that is not part of the job's status."""

    def end(self, scene: Scene) -> None:
        """The final state, in full."""


class LiveOutput(Output):
    """One screen, redrawn in place. Events and notes are part of the scene."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False)
        self._quiet = _QuietTerminal()

    def __enter__(self) -> Self:
        self._quiet.begin()
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.vertical_overflow = "visible"
        self._live.__exit__(None, None, None)
        self._quiet.end()

    def scene(self, scene: Scene) -> None:
        """Draw."""
        self._live.update(live.render(scene), refresh=True)

    def end(self, scene: Scene) -> None:
        """Draw the last time."""
        self._live.vertical_overflow = "visible"
        self.scene(scene)


class _QuietTerminal:
    """Keeps the terminal from writing `^C` into the view, which would move it down by a line."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def begin(self) -> None:
        """Switch the echo of control characters off."""
        with contextlib.suppress(termios.error, OSError, ValueError):
            attributes = termios.tcgetattr(sys.stdin)
            self._before = list(attributes)
            attributes[3] &= ~termios.ECHOCTL
            termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)

    def end(self) -> None:
        """Restore the terminal."""
        if self._before is not None:
            with contextlib.suppress(termios.error, OSError, ValueError):
                termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)


class _Lines(Output):
    """Lines on a stream, flushed at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __exit__(self, *_: object) -> None:
        self._stream.flush()


class PlainOutput(_Lines):
    """One line per transition, and progress from time to time."""

    def __init__(self, stream: TextIO, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__(stream)
        self._clock = clock
        self._shown_at: dict[str, datetime] = {}
        self._shown: dict[str, object] = {}

    def scene(self, scene: Scene) -> None:
        """A line if the stage or its attempt changed, or if the last progress line is old enough."""
        status = scene.status
        running = next((record for record in reversed(status.attempts) if record.outcome == "running"), None)
        if running is not None and self._changed("attempt", (running.stage, running.number)):
            again = f", attempt {running.number}" if running.number > 1 else ""
            self._say(f"{running.stage} starts{again}")
            self._shown_at["progress"] = self._clock()
        for sentence in status.warnings:
            if self._changed(f"warning {sentence}", True):
                self._say(f"warning: {sentence}")
        line = progress_line(scene) if running is not None else ""
        if line and self._due("progress", LINE_SECONDS) and self._changed("progress", line):
            self._say(line)
        elif (
            status.activity not in QUIET_ACTIVITIES
            and self._due("activity", ACTIVITY_SECONDS)
            and self._changed("activity", status.activity)
        ):
            self._say(f"{status.stage or ''} {status.activity}".strip())

    def event(self, kind: str, reason: str, message: str) -> None:
        """One line."""
        if reason not in QUIET_EVENTS:
            self._say(f"{reason}: {message}")

    def note(self, sentence: str) -> None:
        """One line."""
        self._say(sentence)

    def end(self, scene: Scene) -> None:
        """The table of results and all paths."""
        self.scene(scene)
        status = scene.status
        if status.is_true(ConditionType.COMPLETE) or status.results is not None:
            Console(file=self._stream, width=100, color_system=None, highlight=False).print(
                live.Printable(Group(*render_end(scene)))
            )

    def _changed(self, what: str, value: object) -> bool:
        if self._shown.get(what) == value:
            return False
        self._shown[what] = value
        return True

    def _due(self, what: str, seconds: float) -> bool:
        now = self._clock()
        last = self._shown_at.get(what)
        if last is not None and (now - last).total_seconds() < seconds:
            return False
        self._shown_at[what] = now
        return True

    def _say(self, line: str) -> None:
        stamp = self._clock().astimezone().strftime("%H:%M:%S")
        print(f"{stamp} {printable(line)}", file=self._stream, flush=True)


def progress_line(scene: Scene) -> str:
    """`train 120/450 steps (27%), loss 1.234, 1,204 tokens/s, 12:10 min to go`; empty before the first step."""
    status, progress = scene.status, scene.status.progress
    if progress is None or not progress.total or not progress.step:
        return ""
    parts = [f"{status.stage or ''} {amount(progress.step, progress.total, progress.unit)}".strip()]
    parts[0] += f" ({100 * progress.step // progress.total}%)"
    parts += [f"loss {measure(progress.loss)}"] if progress.loss is not None else []
    parts += [f"{count(progress.tokens_per_second)} tokens/s"] if progress.tokens_per_second else []
    parts += [f"{duration(progress.eta_seconds)} to go"] if progress.eta_seconds is not None else []
    return ", ".join(parts)


class JsonOutput(_Lines):
    """One JSON object per line: `event`, `note`, `progress`, and at the end `status` with the whole resource."""

    def __init__(self, stream: TextIO, resource: Callable[[], dict[str, Any]]) -> None:
        super().__init__(stream)
        self._resource = resource
        self._last: object = None

    def scene(self, scene: Scene) -> None:
        """A line if the progress changed."""
        status = scene.status
        progress = status.progress.to_wire() if status.progress is not None else {}
        known = {"stage": status.stage, "phase": status.phase, "activity": status.activity, "progress": progress}
        if known != self._last:
            self._last = known
            self._write("progress", known)

    def event(self, kind: str, reason: str, message: str) -> None:
        """One line."""
        self._write("event", {"severity": kind, "reason": reason, "message": message})

    def note(self, sentence: str) -> None:
        """One line."""
        self._write("note", {"message": sentence})

    def end(self, scene: Scene) -> None:
        """The whole resource."""
        self._write("status", {"resource": self._resource()})

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        line = {"time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "type": kind} | fields
        print(json.dumps(line, ensure_ascii=False), file=self._stream, flush=True)
