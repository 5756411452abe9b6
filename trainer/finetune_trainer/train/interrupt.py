"""SIGTERM and SIGINT end the process at once before the first step, and after a collective checkpoint from then on."""

from __future__ import annotations

import signal
from types import FrameType

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError


class Interrupt:
    """Whether this process has received SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        """Handle SIGTERM and SIGINT; call it in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def defer_signals(self) -> None:
        """From now on signals only set `requested`; the loop saves a checkpoint and ends."""
        self._deferred = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            raise preempted("before the first step")


def preempted(when: str) -> TrainerError:
    """The error of a run that was stopped by a signal."""
    return TrainerError(FailureClass.PREEMPTED, f"Stopped by a signal {when}; the next attempt resumes there.")
