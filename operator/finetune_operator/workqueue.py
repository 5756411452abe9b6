"""One queue of keys: each at most once in it, one worker a key at a time, delays, and a backoff for each key."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BASE_SECONDS = 0.2
CAP_SECONDS = 60.0


class WorkQueue(Generic[K]):
    """A key that is added while it is worked on comes again afterwards; the earliest of several delays counts."""

    def __init__(self) -> None:
        self._ready: deque[K] = deque()
        self._waiting: set[K] = set()
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._wake = asyncio.Event()

    @property
    def depth(self) -> int:
        """Keys that are ready to be worked on."""
        return len(self._ready)

    def add(self, key: K) -> None:
        """Have a key worked on as soon as possible."""
        self._forget_timer(key)
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.append(key)
            self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Have a key worked on after a while, unless it is earlier anyway."""
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
        """Have a key worked on again after its backoff, exponential in its failures in a row."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        seconds = min(BASE_SECONDS * 2.0 ** (count - 1), CAP_SECONDS) * random.uniform(0.75, 1.25)
        self.add_after(key, max(seconds, at_least))

    def succeeded(self, key: K) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key; the caller has it alone until `done`."""
        while not self._ready:
            self._wake.clear()
            await self._wake.wait()
        key = self._ready.popleft()
        self._waiting.discard(key)
        self._working.add(key)
        return key

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
