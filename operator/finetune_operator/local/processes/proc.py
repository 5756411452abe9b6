"""Finding and ending processes by what they inherited, so that none of a job's is missed and no other is hit.

Every process of an attempt carries `FINETUNE_PROCESS=<uid>/<stage>/<n>/<node>` in its environment. Ranks under
torchrun have sessions of their own, so that a process group alone does not hold them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from finetune_operator.local.processes.environment import PROCESS_VARIABLE

PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1


def marked(prefix: str, proc: Path = PROC) -> list[int]:
    """Pids of living processes whose marker is `prefix` or lies below it. Needs /proc; [] where there is none."""
    wanted = f"{PROCESS_VARIABLE}={prefix}".encode()
    found = []
    for entry in proc.glob("[0-9]*") if proc.is_dir() else ():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if any(variable == wanted or variable.startswith(wanted + b"/") for variable in variables):
            found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each that still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def parent(pid: int, proc: Path = PROC) -> int:
    """Pid of the parent; 0 if the process is gone."""
    try:
        # The name in parentheses may hold spaces and parentheses itself.
        return int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def end_orphans(prefix: str, grace_seconds: float, tell: Callable[[str], None], poll_seconds: float = 0.1) -> int:
    """End what an earlier, killed run of the job has left: first asked to checkpoint, then killed. Returns how many.

    Only the topmost get the first signal, as in a pod: launchers pass it on to their ranks.
    """
    orphans = marked(prefix)
    if not orphans:
        return 0
    tell(f"Ending {len(orphans)} processes that an earlier run of this job left behind.")
    send([pid for pid in orphans if parent(pid) not in orphans], signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while marked(prefix) and time.monotonic() < deadline:
        time.sleep(poll_seconds)
    while left := marked(prefix):
        send(left, signal.SIGKILL)
        time.sleep(poll_seconds)
    return len(orphans)


def end_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program, so that it is asked to stop (SIGTERM) if this process is killed."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl  # noqa: B018 - absent on anything but Linux
    except (OSError, AttributeError):
        return None
    here = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != here:  # already gone before the wish was made
            os._exit(1)

    return prepare


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def oom_kills() -> int:
    """Kills for lack of memory so far: of this cgroup if it counts them, else of the machine."""
    for name in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"):
        try:
            words = Path(name).read_text().split()
            return int(words[words.index("oom_kill") + 1])
        except (OSError, ValueError, IndexError):
            continue
    return 0
