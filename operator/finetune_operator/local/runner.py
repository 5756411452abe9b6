"""observe → decide → record → act, for one job with processes of this machine in place of pods.

The decisions are those of the operator on a cluster; nothing is decided here. Ctrl-C is `suspend: true`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from finetune_api.base import Stage
from finetune_api.files import write_json
from finetune_api.report import Report
from finetune_api.runconfig import REPORTS_DIRECTORY, Attempt, JobRef, Paths, RunConfig, resolve
from finetune_api.status import ConditionType, JobStatus
from finetune_operator.decision.decide import decide
from finetune_operator.decision.model import (
    Action,
    Child,
    CleanUp,
    Decision,
    DeleteChild,
    EnsureShared,
    Environment,
    Event,
    Observation,
    Planner,
    StartAttempt,
)
from finetune_operator.decision.next_attempt import with_plan
from finetune_operator.devices import loopback_interface
from finetune_operator.errors import EXIT_BAD_SPEC, EXIT_COMPLETE, EXIT_FAILED, EXIT_GATE_REFUSED, EXIT_INTERRUPTED
from finetune_operator.local.jobfile.record import Record
from finetune_operator.local.processes import process_table
from finetune_operator.local.processes.children import Environ
from finetune_operator.local.processes.environment import environment
from finetune_operator.local.processes.placement import Node, Placement
from finetune_operator.local.processes.tokens import Tokens, without_secrets
from finetune_operator.sizing.plan import plan_run

POLL_SECONDS = 0.5
"""How often reports are read; the end of a process is noticed at once."""
M = TypeVar("M", bound=BaseModel)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Listener(Protocol):
    """Shows what happens."""

    def status(self, record: Record) -> None:
        """Called after every decision, whether the status has changed or not."""

    def event(self, event: Event) -> None:
        """What would be a Kubernetes Event on a cluster."""

    def note(self, sentence: str) -> None:
        """A message that only a local run has."""


class Processes(Protocol):
    """The processes that run attempts, on this machine or on several."""

    @property
    def alive(self) -> bool:
        """Whether any process still runs."""

    def recover(self, tell: Callable[[str], None]) -> None:
        """End the processes that a run which was killed has left behind."""

    def observe(self) -> tuple[Child, ...]:
        """The children as they are now."""

    def start(self, attempt: Attempt, nodes: tuple[Node, ...], environ: Environ) -> None:
        """Start an attempt that has no child yet."""

    def delete(self, stage: Stage, number: int) -> None:
        """Ask an attempt's processes to end, within their grace period."""

    def forget(self) -> None:
        """Forget what has ended."""

    def kill(self) -> None:
        """End everything at once."""

    def close(self) -> None:
        """End the processes that still run."""


@dataclass(frozen=True)
class RunSettings:
    """What a run needs besides the job."""

    placement: Placement
    source: Path
    cache: Path
    tokens: Tokens = field(default_factory=Tokens)
    version: str = ""
    decisions: Environment = field(default_factory=lambda: Environment(local=True))
    planner: Planner = plan_run
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))


class Runner:
    """Runs one job to its end, or until Ctrl-C."""

    def __init__(self, record: Record, settings: RunSettings, children: Processes, listener: Listener) -> None:
        self._record, self._settings, self._children, self._listener = record, settings, children, listener
        self._stops = 0
        self._reports: dict[Path, tuple[int, Report | None]] = {}
        spec = resolve(record.job.spec)
        self._spec = spec.model_copy(update={"topology": settings.placement.apply(spec.topology)})

    def run(self) -> int:
        """Run until the job is complete, has failed or was stopped; returns the exit code."""
        self._children.recover(self._listener.note)
        with stop_signals(self._stop) as wait:
            try:
                while True:
                    decision = self._step()
                    if self._over(decision):
                        return exit_code(self._record.status)
                    if decision.settled and not decision.actions:
                        wait(min(POLL_SECONDS, decision.requeue_after or POLL_SECONDS))
            finally:
                self._children.close()

    def _step(self) -> Decision:
        record = self._record
        observation = with_plan(self._observe(), self._settings.planner)
        decision = decide(observation)
        if decision.wire != observation.wire:
            record.status = decision.status
            record.save()
        for event in decision.events:
            self._listener.event(event)
        for action in decision.actions:
            self._act(action)
        self._listener.status(record)
        return decision

    def _over(self, decision: Decision) -> bool:
        status = self._record.status
        ends = (ConditionType.COMPLETE, ConditionType.FAILED, ConditionType.SUSPENDED)
        at_rest = decision.settled and not decision.actions
        return at_rest and any(status.is_true(end) for end in ends) and not self._children.alive

    # Observe ------------------------------------------------------------------------------------------

    def _observe(self) -> Observation:
        metadata, record = self._record.job.metadata, self._record
        spec = self._spec.model_copy(update={"suspend": True}) if self._stops else self._spec
        return Observation(
            namespace=metadata.namespace,
            name=metadata.name,
            uid=metadata.uid,
            generation=metadata.generation,
            spec=spec,
            status=record.status,
            now=datetime.now(UTC),
            annotations=metadata.annotations,
            children=self._children.observe(),
            reports=tuple(self._read_reports()),
            credentials_version=self._settings.tokens.version(record.uid),
            environment=self._settings.decisions,
        )

    def _read_reports(self) -> Iterator[Report]:
        for file in sorted((self._record.run / REPORTS_DIRECTORY).glob("*.json")):
            with contextlib.suppress(FileNotFoundError):
                changed = file.stat().st_mtime_ns
                cached = self._reports.get(file)
                if cached is None or cached[0] != changed:
                    cached = self._reports[file] = (changed, _read(Report, file))
                stage, _, number = file.stem.rpartition("-")
                if cached[1] is not None and cached[1].attempt == f"{self._record.uid}/{stage}/{number}":
                    yield cached[1]

    # Act ----------------------------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        match action:
            case EnsureShared():
                self._write_config()
            case StartAttempt(attempt=attempt):
                nodes = self._settings.placement.nodes_of(attempt.stage, self._spec, process_table.free_port())
                self._children.start(attempt, nodes, self._environ(attempt, len(nodes)))
            case DeleteChild(stage=stage, number=number):
                self._children.delete(stage, number)
            case CleanUp():
                self._children.forget()

    def _environ(self, attempt: Attempt, nodes: int) -> Environ:
        """The environment of each node; ranks on several machines must not communicate over loopback."""
        inherited = without_secrets(self._settings.environ)
        elsewhere = self._settings.placement.rendezvous is not None and nodes > 1
        return lambda node: environment(
            inherited,
            node,
            attempt,
            self._spec,
            config_file=str(self._record.config_file),
            cache=str(self._settings.cache),
            interface="" if elsewhere else loopback_interface(),
        )

    def _write_config(self) -> None:
        """Write the run config, from the job alone: what an earlier one says is not trusted."""
        metadata = self._record.job.metadata
        config = RunConfig(
            job=JobRef(namespace=metadata.namespace, name=metadata.name, uid=metadata.uid),
            spec=self._spec,
            paths=Paths(run=str(self._record.run), cache=str(self._settings.cache), source=str(self._settings.source)),
            operator_version=self._settings.version,
        )
        if config != _read(RunConfig, self._record.config_file):
            write_json(self._record.config_file, config.to_wire(), indent=1)

    # Stop ---------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._stops += 1
        if self._stops == 1:
            after = " after saving a checkpoint" if self._children.alive else ""
            self._listener.note(f"Stopping{after}. Press Ctrl-C again to stop at once.")
        else:
            self._listener.note("Stopping at once.")
            self._children.kill()


def exit_code(status: JobStatus) -> int:
    """The exit code for the status of a job that has ended or was stopped."""
    if status.is_true(ConditionType.COMPLETE):
        return EXIT_COMPLETE
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True":
        return {"GateRefused": EXIT_GATE_REFUSED, "BadSpec": EXIT_BAD_SPEC}.get(failed.reason, EXIT_FAILED)
    return EXIT_INTERRUPTED


def _read(model: type[M], file: Path) -> M | None:
    try:
        return model.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[Callable[[float], None]]:
    """Call `stop` on Ctrl-C, SIGTERM and SIGHUP; yields a wait that ends early on a signal or the end of a child."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    pending: list[int] = []
    before = {number: signal.signal(number, lambda got, _: pending.append(got)) for number in STOP_SIGNALS}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def wait(seconds: float) -> None:
        if not pending and select.select([reader], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                while reader.recv(4096):
                    pass
        while pending:
            pending.pop()
            stop()

    try:
        yield wait
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
