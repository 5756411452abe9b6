"""One queue of keys: each at most once in it, one worker per key at a time, delays, and a backoff per key.

Jobs in progress go before new ones, so that under load jobs are finished rather than all started: the time from a
child's event to its job's status then does not grow with the number of jobs.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Hashable
from enum import IntEnum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BASE_SECONDS = 0.2
CAP_SECONDS = 60.0
FAIR = 64
"""Every 64th key that is served is the least urgent one, so that none waits forever. If it were more often, new jobs
would start faster than those in progress, some thirty keys each, finish."""


class Urgency(IntEnum):
    """Which key comes first; among equals, the one that was added first."""

    NOW = 0
    """Something happened to a job in progress."""
    NEW = 1
    """A new job, or one that existed when the process started."""
    LAST = 2
    """A job that had ended when the process started."""


class WorkQueue(Generic[K]):
    """A key that is added while it is being served comes again afterwards; of several delays the earliest counts."""

    def __init__(self) -> None:
        self._ready: dict[Urgency, deque[K]] = {urgency: deque() for urgency in Urgency}
        self._waiting: dict[K, Urgency] = {}
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._wake = asyncio.Event()
        self._served = 0

    @property
    def depth(self) -> int:
        """Keys that are ready to be served."""
        return len(self._waiting)

    def add(self, key: K, urgency: Urgency = Urgency.NOW) -> None:
        """Serve a key as soon as possible."""
        self._forget_timer(key)
        if key in self._working:
            self._again.add(key)
        elif urgency < self._waiting.get(key, len(Urgency)):
            # If it waits already, less urgently, its older place is skipped.
            self._waiting[key] = urgency
            self._ready[urgency].append(key)
            self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Serve a key after a delay, unless it comes earlier anyway."""
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        known = self._timers.get(key)
        if known is not None and known.when() <= loop.time() + seconds:
            return
        self._forget_timer(key)
        self._timers[key] = loop.call_later(seconds, self.add, key)

    def add_failed(self, key: K, at_least: float = 0.0) -> None:
        """Serve a key again after its backoff, exponential in its failures in a row."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        seconds = min(BASE_SECONDS * 2.0 ** (count - 1), CAP_SECONDS) * random.uniform(0.75, 1.25)
        self.add_after(key, max(seconds, at_least))

    def succeeded(self, key: K) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key; the caller has it alone until `done`."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        self._served += 1
        order = reversed(Urgency) if self._served % FAIR == 0 else Urgency
        key = next(key for urgency in order if (key := self._first(urgency)) is not None)
        del self._waiting[key]
        self._working.add(key)
        return key

    def _first(self, urgency: Urgency) -> K | None:
        """Take the first key of an urgency that still waits with it."""
        ready = self._ready[urgency]
        while ready:
            key = ready.popleft()
            if self._waiting.get(key) is urgency:
                return key
        return None

    def done(self, key: K) -> None:
        """Give a key back."""
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _forget_timer(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
