"""`finetune watch NAME`: the live view of `finetune run`, of a job on a cluster."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_operator.commands._cluster import Context, Name, Namespace, ending, exit_code, jobs_in, not_served
from finetune_operator.commands._output import OutputFormat, output_of
from finetune_operator.errors import EXIT_COMPLETE, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from finetune_operator.view.outputs import Output
    from finetune_operator.view.scene import Scene

TICK_SECONDS = 1.0
"""Between two redraws when nothing changes: ages advance."""


async def watch(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    output: Annotated[
        OutputFormat, typer.Option("--output", "-o", help="text: a live view, or plain lines without a terminal.")
    ] = OutputFormat.TEXT,
) -> None:
    """Follow a job until it is complete or has failed. Ctrl-C stops watching; the job keeps running.

    Exit codes: 0 complete, 1 failed, 3 the gate refused the model, 130 interrupted.
    """
    from finetune_operator.cluster.as_user.job_watch import watch_job, with_ticks

    async with jobs_in(namespace, context) as jobs:
        view = JobView(await jobs.get(name))
        try:
            with output_of(output, lambda: view.job) as out:
                out.scene(view.scene())
                async for change in with_ticks(watch_job(jobs, name), TICK_SECONDS):
                    if change is not None:
                        view.update(change, out)
                    if exit_code(view.status) != EXIT_INTERRUPTED:
                        break
                    view.check_served(out)
                    out.scene(view.scene())
                out.end(view.scene())
        except asyncio.CancelledError:  # Ctrl-C
            print(f"{name} keeps running; the same command shows it again.", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    code = exit_code(view.status)
    if code != EXIT_COMPLETE and not output.live:
        from finetune_operator.errors import say_error

        say_error(ending(view.status))
    raise typer.Exit(code)


class JobView:
    """The newest state of a job, and the curves of its progress so far."""

    def __init__(self, job: dict[str, Any]) -> None:
        from finetune_api.spec import FineTuneJobSpec
        from finetune_api.status import JobStatus
        from finetune_operator.view.scene import History

        self.job = job
        # A newer operator may know fields of the spec that this version does not: they are not shown.
        self._spec = FineTuneJobSpec.model_validate(job["spec"])
        self.status = JobStatus.parse(job.get("status"))
        self._notes: tuple[str, ...] = ()
        self._history = History()
        self._history.add_progress(self.status.progress)

    def update(self, job: dict[str, Any], out: Output) -> None:
        """Take in a change, and show the transitions in it."""
        from finetune_api.status import JobStatus
        from finetune_operator.decision.events import between

        status = JobStatus.parse(job.get("status"))
        for event in between(self.status, status):
            out.event(event.type, event.reason, event.message)
        self.job, self.status = job, status
        self._history.add_progress(status.progress)

    def check_served(self, out: Output) -> None:
        """Note once that no operator serves the job; drop the note when one does."""
        sentence = not_served(self.job, datetime.now(UTC))
        if sentence and not self._notes:
            out.note(sentence)
        self._notes = (sentence,) if sentence else ()

    def scene(self) -> Scene:
        """The job at this moment."""
        from finetune_operator.view.scene import Scene

        return Scene(
            name=str(self.job["metadata"]["name"]),
            spec=self._spec,
            status=self.status,
            now=datetime.now(UTC),
            history=self._history,
            notes=self._notes,
        )
