"""Child processes that never outlive the tests, and waiting for conditions instead of sleeping."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tests.support.time_limits import scaled

_Seen = TypeVar("_Seen")

_POLL_SECONDS = (0.03, 0.3)
"""Between two looks: at first, and after a while. Who waits long must not keep busy what he waits for."""
_PR_SET_PDEATHSIG = 1
# Below the range from which the kernel picks source ports of outgoing connections, so that no
# connection opened between choosing and listening can take the port away.
_PORTS = range(20000, 32000)
_WORKER = re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", ""))


class ProcessDiedError(RuntimeError):
    """A program of the control plane ended by itself; the message carries the end of its log."""


class TimedOutError(AssertionError):
    """A condition did not come true in time; the message says which."""


def wait_until(condition: Callable[[], _Seen | None], what: str, timeout_seconds: float = 90) -> _Seen:
    """Return the first truthy value of a condition, or raise `TimedOutError` naming what was awaited.

    The integration tests need 12 of the 90 seconds where four programs share a core; real pods, which import
    torch there, a multiple.
    """
    timeout_seconds = scaled(timeout_seconds)
    deadline = time.monotonic() + timeout_seconds
    pause, longest = _POLL_SECONDS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimedOutError(f"After {timeout_seconds:.3g} s still waiting for {what}. Last seen: {value!r}")
        time.sleep(pause)
        pause = min(1.3 * pause, longest)


def free_ports(count: int) -> list[int]:
    """Return that many different TCP ports on which nobody listens, on loopback or elsewhere."""
    candidates = random.sample(_own_ports(), k=min(100 * count, len(_own_ports())))
    free = list(itertools.islice((port for port in candidates if _is_free(port)), count))
    if len(free) < count:
        raise RuntimeError(f"Of {len(candidates)} random ports fewer than {count} are free.")
    return free


def _own_ports() -> range:
    """A fifth of the ports for each of the test processes that run side by side: none takes what another has chosen."""
    return _PORTS[int(_WORKER) % 5 :: 5] if _WORKER else _PORTS


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            # On every address: the operator listens on all, and others may listen on another one than loopback.
            probe.bind(("", port))
        except OSError:
            return False
    return True


class Process:
    """One program in a process group of its own, its output in a log file."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._command = [str(word) for word in command]
        self._environment = {**os.environ, **(environment or {})}
        self._running: subprocess.Popen[bytes] | None = None
        self._log_begins = 0

    @property
    def pid(self) -> int | None:
        """The process id while the program was started and not stopped."""
        return self._running.pid if self._running else None

    def start(self) -> None:
        """Start the program; a second start after `stop` appends to the same log.

        Has to be called from a thread that lives as long as the program should: on Linux the
        kernel kills the program when that thread ends, which is what cleans up after a killed
        test run.
        """
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            self._running = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def stop(self) -> None:
        """Kill the process group at once: nothing in a throw-away control plane needs a goodbye."""
        running, self._running = self._running, None
        if running is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()

    def check(self) -> None:
        """Raise `ProcessDiedError` if the program ended by itself."""
        if self._running is not None and self._running.poll() is not None:
            raise ProcessDiedError(f"{self.name} ended with exit code {self._running.returncode}.\n{self.tail()}")

    def has_said(self, text: str) -> bool:
        """Whether the program wrote a text to its log since it was last started."""
        with self.log.open("rb") as log:
            log.seek(self._log_begins)
            return text.encode() in log.read()

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _die_with_parent() -> None:
    # The libc is looked up in the child: between fork and exec nothing else may be touched.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
