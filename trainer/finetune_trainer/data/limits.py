"""Bounds on what templates may do: Jinja's sandbox bounds neither time nor memory, and models bring templates along."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError

Result = TypeVar("Result")

RENDER_SECONDS = 5.0
"""Of processor time, so that a busy machine refuses no template."""
RENDER_BYTES = 512 << 20
LONGEST_RENDERED = 1 << 26
"""Characters."""


class _OutOfTimeError(BaseException):
    """No Exception, which a template's filters might catch."""


def within_limits(render: Callable[[], Result], what: str, field: str) -> Result:
    """What `render` returns. Raises TrainerError (bad-spec) for `field` where it needs too much time or memory.

    what: begins the sentence. Time is limited in the main thread alone, memory on Linux alone.
    """
    try:
        with _time_limit(), _memory_limit():
            rendered = render()
    except _OutOfTimeError:
        why = f"takes longer than {RENDER_SECONDS:.0f} s"
    except MemoryError:
        why = f"needs more than {RENDER_BYTES >> 20} MiB of memory"
    except RecursionError:
        why = "is nested too deeply"
    else:
        if not isinstance(rendered, str) or len(rendered) <= LONGEST_RENDERED:
            return rendered
        why = f"renders more than {LONGEST_RENDERED:,} characters"
    raise TrainerError(FailureClass.BAD_SPEC, f"{what} {why}: simplify it.", field)


@contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_SECONDS, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    statistics = _own_statistics(os.getpid())
    if statistics is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(os.pread(statistics, 64, 0).split()[0])
    wanted = pages * resource.getpagesize() + RENDER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *(at for at in (soft, hard) if at >= 0)]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@lru_cache(maxsize=1)
def _own_statistics(pid: int) -> int | None:
    """Descriptor of the file with this process's size, kept open as rows are many; None where there is none."""
    try:
        return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
