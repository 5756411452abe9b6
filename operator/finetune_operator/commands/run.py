"""`finetune run FILE`: a FineTuneJob on this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_api import INSTALL
from finetune_api.runconfig import METRICS_FILE
from finetune_operator.commands._output import OutputFormat, output_of
from finetune_operator.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from finetune_api.rendezvous import Rendezvous
    from finetune_operator.decision.model import Event
    from finetune_operator.local.jobfile.job_file import JobFile
    from finetune_operator.local.jobfile.record import Record
    from finetune_operator.local.machines.coordinator import Coordinator
    from finetune_operator.local.processes.placement import Placement
    from finetune_operator.view.outputs import Output
    from finetune_operator.view.scene import Scene

AllowEnv = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-env",
        help="Take this variable from podTemplate.env, although it may load code or redirect connections. Repeatable.",
        metavar="NAME",
    ),
]


def run(
    file: Annotated[str, typer.Argument(help="File with one FineTuneJob; - reads standard input.", metavar="FILE")],
    workdir: Annotated[
        Path, typer.Option(help="Directory for runs: <workdir>/<namespace>/<name>/<uid>.", metavar="DIR")
    ] = Path("runs"),
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a field, such as training.epochs=1 or datasets.tweets.maxRows=100.",
            metavar="PATH=VALUE",
        ),
    ] = None,
    output: Annotated[
        OutputFormat, typer.Option(help="text: a live view, or plain lines without a terminal.")
    ] = OutputFormat.TEXT,
    retry: Annotated[bool, typer.Option("--retry", help="Retry the failed stage; completed stages are kept.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run; earlier runs are kept.")] = False,
    allow_env: AllowEnv = None,
) -> None:
    """Run a FineTuneJob on this machine.

    Ctrl-C saves a checkpoint and stops; the same command resumes from it. Tokens are read from HF_TOKEN,
    HF_PUBLISH_TOKEN and WANDB_API_KEY; downloads are kept in FINETUNE_CACHE. Exit codes: 0 complete, 1 failed,
    2 bad spec, 3 gate refused, 130 interrupted.

    On several machines (PET_NNODES or RunPod's NUM_NODES), run the same command on each: machine 0 coordinates and
    shows the progress. All machines must mount --workdir and FINETUNE_CACHE at the same path.
    """
    from finetune_operator.local.jobfile import job_file
    from finetune_operator.local.jobfile.record import job_directory, locked
    from finetune_operator.local.processes.environment import check_variables

    loaded = job_file.load(file, overrides or [])
    check_variables(loaded.job.spec, allow_env or [])
    directory = job_directory(workdir.expanduser().resolve(), loaded.job)
    rendezvous = _rendezvous()
    try:
        if rendezvous.node_rank > 0:
            with locked(directory, f".lock-{rendezvous.node_rank}"):
                raise typer.Exit(_work(loaded, directory, rendezvous, allow_env or []))
        with locked(directory), _coordinating(directory, rendezvous) as coordinator:
            code = _run(loaded, directory, output, coordinator, retry=retry, fresh=fresh)
            if coordinator is not None:
                coordinator.end(code)
    except OSError as error:
        raise UserError(
            f"{error.strerror or error}: {error.filename or directory}.{_way_out(error)}", EXIT_FAILED
        ) from error
    raise typer.Exit(code)


def _rendezvous() -> Rendezvous:
    from finetune_api.rendezvous import rendezvous_of

    try:
        return rendezvous_of(os.environ)
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def _coordinating(directory: Path, rendezvous: Rendezvous) -> Iterator[Coordinator | None]:
    """The coordinator of the other machines; None on a single machine."""
    if rendezvous.nodes == 1:
        yield None
        return
    from finetune_operator.local.machines.coordinator import Coordinator, SharedDirectory

    coordinator = Coordinator(SharedDirectory(directory), rendezvous)
    with coordinator.session():
        yield coordinator


def _work(loaded: JobFile, directory: Path, rendezvous: Rendezvous, allow_env: list[str]) -> int:
    """What every machine but the first does."""
    from finetune_api.base import duration_seconds
    from finetune_operator.devices import this_machine
    from finetune_operator.local.jobfile.record import find
    from finetune_operator.local.jobfile.resume import complete
    from finetune_operator.local.machines.coordinator import SharedDirectory
    from finetune_operator.local.machines.worker import Worker, node_starter
    from finetune_operator.local.processes.tokens import tokens_of

    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    def is_over() -> bool:
        earlier = find(directory)
        return earlier is not None and complete(earlier.status)

    require_trainer()
    start = node_starter(rendezvous, this_machine(), tokens_of(os.environ), os.environ, tell, allow_env)
    patience = duration_seconds(loaded.job.spec.timeouts.startup)
    return Worker(SharedDirectory(directory), rendezvous.node_rank, start, tell, is_over).run(patience)


def _way_out(error: OSError) -> str:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return " Free some space, or choose another directory with --workdir; the same command then resumes."
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return " Choose a writable directory with --workdir."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return " Choose a directory with --workdir."
    return ""


class RunView:
    """Passes what the runner reports on to an output."""

    def __init__(self, record: Record, output: Output) -> None:
        from finetune_operator.view.scene import History

        self._record, self._output = record, output
        self._history = History()
        self._notes: list[str] = []
        self._inode, self._offset = 0, 0

    def scene(self) -> Scene:
        """The job as it is now."""
        from finetune_operator.view.scene import Scene

        self._read_metrics()
        return Scene(
            name=self._record.job.metadata.name,
            spec=self._record.job.spec,
            status=self._record.status,
            now=datetime.now(UTC),
            history=self._history,
            run=str(self._record.run),
            notes=tuple(self._notes),
        )

    def _read_metrics(self) -> None:
        """Read the rows that were added; an incomplete row is left for the next time."""
        try:
            with (self._record.run / METRICS_FILE).open("rb") as file:
                # A resumed training cuts the file back to its checkpoint: in place, or by another file.
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self._inode, self._offset = stat.st_ino, 0
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(whole) + len(newline)
        self._history.add_rows(whole.decode("utf-8", errors="replace").splitlines())

    def status(self, record: Record) -> None:
        """The runner has observed the job."""
        self._output.scene(self.scene())

    def event(self, event: Event) -> None:
        """A transition of the job."""
        self._output.event(event.type, event.reason, event.message)

    def note(self, sentence: str) -> None:
        """A sentence from the runner itself."""
        self._notes.append(sentence)
        self._output.note(sentence)


def _run(
    loaded: JobFile,
    directory: Path,
    output_format: OutputFormat,
    coordinator: Coordinator | None,
    *,
    retry: bool,
    fresh: bool,
) -> int:
    from finetune_operator.devices import this_machine
    from finetune_operator.local.jobfile.resume import complete, failed, find_or_create
    from finetune_operator.local.processes.placement import place, place_one_of
    from finetune_operator.local.runner import exit_code

    early: list[str] = []
    record = find_or_create(loaded.job, directory, fresh=fresh, retry=retry, tell=early.append)
    finished = complete(record.status) or (failed(record.status) and not retry)
    if not finished:
        require_trainer()
    topology, placement = record.job.spec.topology, None
    if not finished:
        machine = this_machine()
        placement = place_one_of(coordinator.rendezvous, topology, machine) if coordinator else place(topology, machine)
    record.save()
    with output_of(output_format, record.wire) as output:
        show = RunView(record, output)
        for sentence in early:
            show.note(sentence)
        code = (
            exit_code(record.status) if placement is None else _run_stages(record, loaded, placement, coordinator, show)
        )
        output.end(show.scene())
    shown = output_format.live or (output_format is OutputFormat.TEXT and not finished and _same_stream())
    _last_words(record, code, finished=finished, shown=shown)
    return code


def _run_stages(
    record: Record, loaded: JobFile, placement: Placement, coordinator: Coordinator | None, show: RunView
) -> int:
    from finetune_operator.decision.model import Environment
    from finetune_operator.devices import memory
    from finetune_operator.local.machines.coordinator import Machines
    from finetune_operator.local.processes.children import Children
    from finetune_operator.local.processes.tokens import tokens_of
    from finetune_operator.local.runner import Runner, RunSettings
    from finetune_operator.sizing.gpus import cpu_has_bf16, gpu_here
    from finetune_operator.sizing.plan import planner_for

    tokens = tokens_of(os.environ)
    for sentence in placement.notes:
        show.note(sentence)
    if tokens.borrowed and loaded.job.spec.publish is not None and loaded.job.spec.publish.repo is not None:
        show.note("HF_PUBLISH_TOKEN is not set; publishing uses HF_TOKEN.")
    settings = RunSettings(
        placement=placement,
        source=loaded.source,
        cache=cache_directory(),
        tokens=tokens,
        version=version_of("finetune-operator"),
        planner=planner_for(gpu_here(placement.gpus[0]) if placement.gpus else None, cpu_bf16=cpu_has_bf16()),
        # Someone is watching and can see a persistent failure: shorter back-off than on a cluster.
        decisions=Environment(local=True, backoff_base_seconds=3.0, backoff_cap_seconds=60.0),
    )
    children = Children(record.run, record.uid, tokens, memory_limit=f"{memory() / 2**30:.0f}Gi")
    attempt_children = Machines(children, coordinator, record.run) if coordinator else children
    return Runner(record, settings, attempt_children, show).run()


def cache_directory() -> Path:
    """`$FINETUNE_CACHE`, or `finetune-operator` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FINETUNE_CACHE") or f"{home}/finetune-operator").expanduser().resolve()


def require_trainer(command: str = "run") -> None:
    """Raise UserError, with what to install, if the trainer is not installed."""
    for name in ("finetune_trainer", "torch"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"finetune {command} needs {name}, which is not installed: {INSTALL.format(extra='trainer')}."
            )


def _same_stream() -> bool:
    """Whether stdout and stderr are the same terminal, pipe or file."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):
        return False


def _last_words(record: Record, code: int, *, finished: bool, shown: bool) -> None:
    """What the user should know at the end, on stderr; the failure only if it was not `shown`."""
    from finetune_api.status import ConditionType
    from finetune_operator.errors import say_error

    status, name = record.status, record.job.metadata.name
    failed = status.condition(ConditionType.FAILED)
    if code == EXIT_COMPLETE:
        if finished:
            print(f"{name} is already complete.", file=sys.stderr)
    elif code == EXIT_INTERRUPTED and record.job.spec.suspend:
        print(f"{name} is suspended (spec.suspend: true); resume it with --set suspend=false.", file=sys.stderr)
    elif code == EXIT_INTERRUPTED:
        step = f" from step {status.last_checkpoint.step:,}" if status.last_checkpoint else ""
        print(f"{name} is stopped; the same command resumes it{step}.", file=sys.stderr)
    else:
        if failed is not None and not shown:
            say_error(failed.message)
        earlier = f"{name} failed before. " if finished else ""
        print(f"{earlier}Run again with --retry to redo only the failed stage.", file=sys.stderr)
