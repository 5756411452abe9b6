"""The side of every machine but 0: runs what machine 0 commands, and reports how it went (coordinator.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.files import write_json
from finetune_api.rendezvous import Rendezvous
from finetune_api.runconfig import RUN_CONFIG_FILE, Attempt, RunConfig
from finetune_operator.decision.model import Pod, PodPhase
from finetune_operator.devices import Machine
from finetune_operator.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_INTERRUPTED, UserError
from finetune_operator.local.machines.coordinator import (
    HEARTBEAT_SECONDS,
    Command,
    Heartbeat,
    SharedDirectory,
    WorkerStatus,
    read,
)
from finetune_operator.local.processes.children import Children
from finetune_operator.local.processes.environment import check_variables, environment
from finetune_operator.local.processes.placement import place_one_of
from finetune_operator.local.processes.tokens import Tokens, without_secrets
from finetune_operator.local.runner import POLL_SECONDS, stop_signals

LATE_SECONDS = 10.0
"""After this long without machine 0, a complete job is taken as over: this machine was started after the end."""
KILLED, ASKED_TO_STOP = 137, 143
"""Exit codes, as of a container, for processes whose own are not known."""

Start = Callable[[Attempt, Path], Children]
"""Starts this machine's node of an attempt in a run directory."""


def node_starter(
    rendezvous: Rendezvous,
    machine: Machine,
    tokens: Tokens,
    environ: Mapping[str, str],
    tell: Callable[[str], None],
    allow_env: Collection[str] = (),
) -> Start:
    """A function that starts this machine's node, after it has stopped what a killed run left here."""

    def start(attempt: Attempt, run: Path) -> Children:
        try:
            config = RunConfig.model_validate_json((run / RUN_CONFIG_FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"Cannot read {run / RUN_CONFIG_FILE} on this machine: {error.strerror}.", EXIT_FAILED
            ) from error
        spec, cache = config.spec, config.paths.cache
        check_variables(spec, allow_env)
        if not Path(cache).is_dir():
            raise UserError(
                f"{cache}, where machine 0 keeps the model, does not exist on this machine: mount it on all machines "
                "at the same path and set FINETUNE_CACHE to that path.",
                EXIT_FAILED,
            )
        placement = place_one_of(rendezvous, spec.topology, machine)
        node = placement.nodes_of(attempt.stage, spec, rendezvous.port)[rendezvous.node_rank]
        variables = environment(
            without_secrets(environ),
            node,
            attempt,
            spec,
            config_file=str(run / RUN_CONFIG_FILE),
            cache=cache,
            interface="",
        )
        limit = f"{machine.memory_bytes / 2**30:.0f}Gi"
        children = Children(run, attempt.uid, tokens, limit, rendezvous.node_rank)
        children.recover(tell)
        children.forget()
        children.start(attempt, (node,), lambda _: variables)
        return children

    return start


class Worker:
    """One machine that is commanded by machine 0."""

    def __init__(
        self,
        directory: SharedDirectory,
        index: int,
        start: Start,
        tell: Callable[[str], None],
        is_over: Callable[[], bool],
    ) -> None:
        self._directory, self._index, self._start, self._tell, self._is_over = directory, index, start, tell, is_over
        self._heartbeat = Heartbeat()
        self._status = WorkerStatus(session="")
        self._written = 0.0
        self._children: Children | None = None
        self._stops = 0

    def run(self, patience_seconds: float) -> int:
        """Work until machine 0 has ended; returns its exit code, or that of an interruption.

        Raises UserError if machine 0 is silent for `patience_seconds`.
        """
        self._tell(f"Machine {self._index} is waiting for machine 0.")
        with stop_signals(self._interrupt) as wait:
            try:
                while (code := self.step(patience_seconds)) is None:
                    wait(POLL_SECONDS)
                return code
            finally:
                if self._children is not None:
                    self._children.close()

    def step(self, patience_seconds: float) -> int | None:
        """Read the command once and carry it out; returns the exit code if this was the end."""
        command = self._read_command()
        wanted = command.attempt if command is not None and not self._stops else None
        started = wanted is not None and wanted.id == self._status.attempt
        if self._children is not None and not started:
            self._stop(kill=self._stops > 1 or (command is not None and command.kill))
        elif self._children is None and command is not None and wanted is not None and not started:
            self._start_attempt(wanted, command)
        self._record_end()
        if self._children is None and self._stops:
            return EXIT_INTERRUPTED
        if command is None:
            return self._without_coordinator(patience_seconds) if self._children is None else None
        if command.ended is not None and self._children is None:
            return command.ended
        if time.monotonic() - self._written >= HEARTBEAT_SECONDS:
            self._write_status()
        return None

    def _without_coordinator(self, patience_seconds: float) -> int | None:
        if self._heartbeat.silent_seconds > patience_seconds:
            raise self._no_coordinator(patience_seconds)
        return EXIT_COMPLETE if self._heartbeat.silent_seconds > LATE_SECONDS and self._is_over() else None

    def _read_command(self) -> Command | None:
        """The command of machine 0; None while it is not there."""
        command = read(self._directory.command_file, Command)
        if command is None:
            return None
        self._heartbeat.record(command.session, command.beat)
        if not self._heartbeat.alive:
            return None
        if self._status.session != command.session and self._children is None:
            self._tell("Connected to machine 0.")
            self._status = self._status_before_restart(command)
        return command

    def _status_before_restart(self, command: Command) -> WorkerStatus:
        """The status from before this machine was restarted within the session: an attempt is not started twice."""
        before = read(self._directory.status_file(self._index), WorkerStatus)
        if before is None or before.session != command.session:
            return WorkerStatus(session=command.session)
        if before.exit_code is None and before.attempt:
            return before.model_copy(update={"exit_code": KILLED, "finished": datetime.now(UTC)})
        return before

    def _start_attempt(self, attempt: Attempt, command: Command) -> None:
        self._tell(f"Starting {attempt.stage} (attempt {attempt.number}).")
        self._children = self._start(attempt, Path(command.run))
        self._status = WorkerStatus(
            session=command.session, beat=self._status.beat, attempt=attempt.id, started=datetime.now(UTC)
        )
        self._write_status()

    def _record_end(self) -> None:
        """Once this machine's processes have ended, report how."""
        if self._children is None:
            return
        pods = [pod for child in self._children.observe() for pod in child.pods]
        if any(pod.phase is PodPhase.RUNNING for pod in pods):
            return
        pod = pods[0] if pods else Pod(name="", exit_code=ASKED_TO_STOP, finished=datetime.now(UTC))
        self._children.close()
        self._children = None
        self._status.finished, self._status.exit_code = pod.finished, pod.exit_code
        self._status.failure, self._status.oom_killed = pod.failure, pod.oom_killed
        self._status.memory_limit = pod.memory_limit
        self._write_status()

    def _stop(self, *, kill: bool) -> None:
        assert self._children is not None
        for child in self._children.observe():
            self._children.delete(child.stage, child.number)
        if kill:
            self._children.kill()

    def _interrupt(self) -> None:
        self._stops += 1
        self._tell("Stopping. Press Ctrl-C again to stop at once." if self._stops == 1 else "Stopping at once.")

    def _write_status(self) -> None:
        self._status.beat += 1
        self._written = time.monotonic()
        write_json(self._directory.status_file(self._index), self._status.to_wire())

    def _no_coordinator(self, seconds: float) -> UserError:
        return UserError(
            f"Machine 0 has not written to {self._directory.command_file} for {seconds / 60:.0f} minutes: check that "
            "finetune run of the same file is running there, and that --workdir is on a volume that all machines mount "
            "at the same path.",
            EXIT_FAILED,
        )
