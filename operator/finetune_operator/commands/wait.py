"""`finetune wait NAME`: for scripts and pipelines."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from finetune_operator.commands._cluster import (
    Context,
    Name,
    Namespace,
    ending,
    exit_code,
    jobs_in,
    nobody_looks,
    status_of,
)
from finetune_operator.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_INTERRUPTED, UserError

TICK_SECONDS = 0.5


def wait(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Give up after that long, such as 90s, 15m or 1h30m.")
    ] = None,
) -> None:
    """Wait until a job is complete or has failed, and say how it ended.

    Exit codes: 0 complete, 1 failed (or deleted, or the time is over), 3 the gate refused the model.
    """
    from finetune_operator.cluster.as_user.following import follow, ticking

    seconds = _seconds(timeout)
    jobs = jobs_in(namespace, context)
    began = time.monotonic()
    phase, job, told = "Pending", None, False
    for change in ticking(follow(jobs, name), TICK_SECONDS):
        job = change or job
        if job is not None and not told and (sentence := nobody_looks(job, datetime.now(UTC))):
            print(sentence, file=sys.stderr)
            told = True
        if change is not None:
            status = status_of(change)
            phase = str(status.phase)
            code = exit_code(status)
            if code != EXIT_INTERRUPTED:
                _end(name, code, ending(status))
        if seconds is not None and time.monotonic() - began > seconds:
            raise UserError(f"{name} has not ended after {timeout}; it is {phase}.", EXIT_FAILED)


def _end(name: str, code: int, sentence: str) -> None:
    if code != EXIT_COMPLETE:
        raise UserError(f"{name}: {sentence}", code)
    print(f"{name}: {sentence}")
    raise typer.Exit(code)


def _seconds(text: str | None) -> int | None:
    import re

    from finetune_api.base import duration_seconds

    if text is None:
        return None
    if not re.fullmatch(r"([0-9]+(h|m|s))+", text):
        raise UserError(f"--timeout {text} is no length of time: write 90s, 15m or 1h30m.")
    return duration_seconds(text)
