"""Finding and stopping processes by what they inherited, so that none of a job's is missed and no other is hit.

Every process of an attempt carries `FINETUNE_PROCESS=<uid>/<stage>/<n>/<node>` in its environment. A user's
code may start sessions of its own, so that a process group alone does not hold all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable

import psutil

from finetune_operator.local.processes.environment import PROCESS_VARIABLE

_PR_SET_PDEATHSIG = 1


def marked(prefix: str) -> list[psutil.Process]:
    """Living processes of this user whose marker is `prefix` or lies below it, but for this one."""
    others = (process for process in psutil.process_iter(["environ"]) if process.pid != os.getpid())
    markers = ((process, (process.info["environ"] or {}).get(PROCESS_VARIABLE, "")) for process in others)
    return [process for process, marker in markers if f"{marker}/".startswith(f"{prefix}/")]


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to each that still lives."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def stop_orphans(prefix: str, grace_seconds: float, tell: Callable[[str], None], poll_seconds: float = 0.1) -> int:
    """Stop what an earlier, killed run of the job has left: first asked to checkpoint, then killed. Returns how many.

    Only the topmost get the first signal, as in a pod: launchers pass it on to their ranks.
    """
    orphans = marked(prefix)
    if not orphans:
        return 0
    count = f"{len(orphans)} processes" if len(orphans) > 1 else "a process"
    tell(f"Stopping {count} that an earlier run of this job left behind.")
    pids = {process.pid for process in orphans}
    send([process for process in orphans if _parent(process) not in pids], signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while marked(prefix) and time.monotonic() < deadline:
        time.sleep(poll_seconds)
    while left := marked(prefix):
        send(left, signal.SIGKILL)
        time.sleep(poll_seconds)
    return len(orphans)


def _parent(process: psutil.Process) -> int | None:
    """Pid of the parent; None if the process is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None


def end_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program, so that it gets SIGTERM if this process is killed; None but on Linux."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl  # noqa: B018 - absent on anything but Linux
    except (OSError, AttributeError):
        return None
    here = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != here:  # already gone before the request was made
            os._exit(1)

    return prepare


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
