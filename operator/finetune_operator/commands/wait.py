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
    not_served,
    status_of,
)
from finetune_operator.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_INTERRUPTED, UserError

TICK_SECONDS = 0.5


async def wait(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    timeout: Annotated[  # noqa: ASYNC109 - the name of the option
        str | None, typer.Option(metavar="TIME", help="Give up after this time, such as 90s, 15m or 1h30m.")
    ] = None,
) -> None:
    """Wait until a job is complete or has failed, and say how it ended.

    Exit codes: 0 complete, 1 failed (or deleted, or timed out), 3 the gate refused the model.
    """
    from finetune_operator.cluster.as_user.job_watch import watch_job, with_ticks

    seconds = _seconds(timeout)
    began = time.monotonic()
    phase, job, warned = "Pending", None, False
    async with jobs_in(namespace, context) as jobs:
        async for change in with_ticks(watch_job(jobs, name), TICK_SECONDS):
            job = change or job
            if job is not None and not warned and (sentence := not_served(job, datetime.now(UTC))):
                print(sentence, file=sys.stderr)
                warned = True
            if change is not None:
                status = status_of(change)
                phase = str(status.phase)
                code = exit_code(status)
                if code != EXIT_INTERRUPTED:
                    _end(name, code, ending(status))
            if seconds is not None and time.monotonic() - began > seconds:
                raise UserError(f"{name} has not ended after {timeout} (phase {phase}).", EXIT_FAILED)


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
        raise UserError(f"--timeout {text} is not a duration: write 90s, 15m or 1h30m.")
    return duration_seconds(text)
