"""SIGTERM and SIGINT: at once while nothing is worth saving, after a collective checkpoint once training runs."""

from __future__ import annotations

import signal
from types import FrameType

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError


class Interrupt:
    """Whether this process was told to end."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        """Take over SIGTERM and SIGINT; only in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def defer_signals(self) -> None:
        """From now on signals only set `requested`: the loop saves and ends."""
        self._deferred = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            raise preempted("before the first step")


def preempted(when: str) -> TrainerError:
    """The end that was asked for from outside."""
    return TrainerError(FailureClass.PREEMPTED, f"Stopped from outside {when}; it goes on from there.")
