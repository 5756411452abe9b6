"""How a process reports why it ends: on the volume, in the report and in the container's termination message."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.files import write_json
from finetune_api.report import EXIT_CODES, Failure, FailureClass
from finetune_api.runconfig import TERMINATION_VARIABLE
from finetune_trainer.context import RunContext
from finetune_trainer.failures import failure_file

log = logging.getLogger(__name__)

KUBELET_FILE = Path("/dev/termination-log")
TERMINATION_LOG = Path(os.environ.get(TERMINATION_VARIABLE, KUBELET_FILE))


def record_failure(context: RunContext, failure: Failure) -> None:
    """Record the failure on the volume, in the report and in the termination message, wherever that is possible."""
    writers: list[Callable[[], None]] = [
        lambda: write_json(failure_file(context.logs, context.rank), failure.to_wire()),
        lambda: context.reporter.fail(failure),
        lambda: write_termination_message(failure),
    ]
    for write in writers:
        try:
            write()
        except OSError as error:
            log.warning("The failure could not be recorded: %s", error)


def write_termination_message(failure: Failure, path: Path = TERMINATION_LOG) -> None:
    """Leave the message that the kubelet reads (at most 4,096 bytes); does nothing where there is no kubelet."""
    if path.parent.exists() and (path.exists() or path != KUBELET_FILE):
        path.write_text(json.dumps(failure.to_wire()))


def read_termination_message(path: Path = TERMINATION_LOG) -> Failure | None:
    """The termination message that a process of this container has left, if any."""
    with contextlib.suppress(OSError, ValueError):
        return Failure.model_validate_json(path.read_text())
    return None


def exit_as_hung(context: RunContext, sentence: str) -> None:
    """End this process, which makes no progress, at once."""
    failure = Failure(failure_class=FailureClass.HANG, sentence=sentence, rank=context.rank, time=datetime.now(UTC))
    record_failure(context, failure)
    os._exit(EXIT_CODES[FailureClass.HANG])
