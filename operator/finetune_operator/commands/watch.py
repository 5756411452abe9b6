"""`finetune watch NAME`: the live view of `finetune run`, of a job on a cluster."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_operator.commands._cluster import (
    Context,
    Name,
    Namespace,
    ending,
    exit_code,
    jobs_in,
    nobody_looks,
)
from finetune_operator.commands._output import OutputFormat, output_of
from finetune_operator.errors import EXIT_COMPLETE, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from finetune_operator.view.outputs import Output
    from finetune_operator.view.scene import Scene

TICK_SECONDS = 1.0
"""Between two drawings when nothing changes: ages go on."""


def watch(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    output: Annotated[
        OutputFormat, typer.Option("--output", "-o", help="text: a live view, or lines where there is no terminal.")
    ] = OutputFormat.TEXT,
) -> None:
    """Follow a job until it is complete or has failed. Ctrl-C ends the watching, not the job.

    Exit codes: 0 complete, 1 failed, 3 the gate refused the model, 130 interrupted.
    """
    from finetune_operator.cluster.as_user.following import follow, ticking

    jobs = jobs_in(namespace, context)
    changes = ticking(follow(jobs, name), TICK_SECONDS)
    job = next(change for change in changes if change is not None)
    shown = Shown(job)
    try:
        with output_of(output, lambda: shown.job) as out:
            out.scene(shown.scene())
            while exit_code(shown.status) == EXIT_INTERRUPTED:
                change = next(changes)
                if change is not None:
                    shown.take(change, out)
                shown.look_for_the_operator(out)
                out.scene(shown.scene())
            out.end(shown.scene())
    except KeyboardInterrupt:
        print(f"{name} goes on; the same command shows it again.", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    code = exit_code(shown.status)
    if code != EXIT_COMPLETE and not output.live:
        from finetune_operator.errors import say_error

        say_error(ending(shown.status))
    raise typer.Exit(code)


class Shown:
    """The job as it was last seen, and the curves of what was seen of it."""

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

    def take(self, job: dict[str, Any], out: Output) -> None:
        """Take in a change, and tell the transitions in it."""
        from finetune_api.status import JobStatus
        from finetune_operator.decision.events import between

        status = JobStatus.parse(job.get("status"))
        for event in between(self.status, status):
            out.event(event.type, event.reason, event.message)
        self.job, self.status = job, status
        self._history.add_progress(status.progress)

    def look_for_the_operator(self, out: Output) -> None:
        """Say, once, that nobody carries the job out; take it back when somebody does."""
        sentence = nobody_looks(self.job, datetime.now(UTC))
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
