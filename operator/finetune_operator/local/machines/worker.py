"""The side of every machine but 0: does what machine 0 orders, and says how it went (machines.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.files import write_json
from finetune_api.rendezvous import Rendezvous
from finetune_api.runconfig import RUN_CONFIG_FILE, Attempt, RunConfig
from finetune_operator.decision.model import Pod, PodPhase
from finetune_operator.devices import Machine
from finetune_operator.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_INTERRUPTED, UserError
from finetune_operator.local.machines.coordinator import BEAT_SECONDS, Answer, Board, Order, Pulse, read
from finetune_operator.local.processes.children import Children
from finetune_operator.local.processes.environment import environment
from finetune_operator.local.processes.placement import place_one_of
from finetune_operator.local.processes.tokens import Tokens, without_secrets
from finetune_operator.local.runner import POLL_SECONDS, stop_signals

LATE_SECONDS = 10.0
"""After so long without machine 0, a job that is complete is taken as over: this machine came after the end."""
KILLED, ASKED_TO_STOP = 137, 143
"""Exit codes of processes that left none, as a container would have them."""

Start = Callable[[Attempt, Path], Children]
"""Starts this machine's node of an attempt in a run directory."""


def starter(
    meeting: Rendezvous, machine: Machine, tokens: Tokens, environ: Mapping[str, str], tell: Callable[[str], None]
) -> Start:
    """What starts this machine's node, after it has ended what a killed run left here."""

    def start(attempt: Attempt, run: Path) -> Children:
        try:
            config = RunConfig.model_validate_json((run / RUN_CONFIG_FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{run / RUN_CONFIG_FILE} cannot be read here: {error.strerror}.", EXIT_FAILED) from error
        spec, cache = config.spec, config.paths.cache
        if not Path(cache).is_dir():
            raise UserError(
                f"There is no {cache} here, where machine 0 keeps the model: mount it on all machines at the same path "
                "and name it in FINETUNE_CACHE.",
                EXIT_FAILED,
            )
        placement = place_one_of(meeting, spec.topology, machine)
        node = placement.nodes_of(attempt.stage, spec, meeting.port)[meeting.node_rank]
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
        children = Children(run, attempt.uid, tokens, limit, meeting.node_rank)
        children.recover(tell)
        children.forget()
        children.start(attempt, (node,), lambda _: variables)
        return children

    return start


class Follower:
    """One machine that follows machine 0."""

    def __init__(
        self, board: Board, index: int, start: Start, tell: Callable[[str], None], is_over: Callable[[], bool]
    ) -> None:
        self._board, self._index, self._start, self._tell, self._is_over = board, index, start, tell, is_over
        self._pulse = Pulse()
        self._answer = Answer(session="")
        self._written = 0.0
        self._children: Children | None = None
        self._stops = 0

    def run(self, patience_seconds: float) -> int:
        """Follow until machine 0 has ended; returns its exit code, or that of an interruption.

        Raises UserError if nobody leads for so long.
        """
        self._tell(f"Machine {self._index} waits for machine 0.")
        with stop_signals(self._interrupt) as wait:
            try:
                while (code := self.step(patience_seconds)) is None:
                    wait(POLL_SECONDS)
                return code
            finally:
                if self._children is not None:
                    self._children.close()

    def step(self, patience_seconds: float) -> int | None:
        """Look once and do what is to be done; the exit code if this was the end."""
        order = self._hear()
        wanted = order.attempt if order is not None and not self._stops else None
        if self._children is not None and (wanted is None or wanted.id != self._answer.attempt):
            self._stop(kill=self._stops > 1 or (order is not None and order.kill))
        elif self._children is None and order is not None and wanted is not None and wanted.id != self._answer.attempt:
            self._begin(wanted, order)
        self._note_end()
        if self._children is None and self._stops:
            return EXIT_INTERRUPTED
        if order is None:
            return self._alone(patience_seconds) if self._children is None else None
        if order.ended is not None and self._children is None:
            return order.ended
        if time.monotonic() - self._written >= BEAT_SECONDS:
            self._say()
        return None

    def _alone(self, patience_seconds: float) -> int | None:
        if self._pulse.silent_seconds > patience_seconds:
            raise self._nobody(patience_seconds)
        return EXIT_COMPLETE if self._pulse.silent_seconds > LATE_SECONDS and self._is_over() else None

    def _hear(self) -> Order | None:
        """What machine 0 orders; None while it is not there."""
        order = read(self._board.orders, Order)
        if order is None:
            return None
        self._pulse.feel(order.session, order.beat)
        if not self._pulse.beats:
            return None
        if self._answer.session != order.session and self._children is None:
            self._tell("Machine 0 is there.")
            self._answer = self._earlier(order)
        return order

    def _earlier(self, order: Order) -> Answer:
        """What this machine said in this session before it was started again: its attempt is not begun twice."""
        before = read(self._board.answers(self._index), Answer)
        if before is None or before.session != order.session:
            return Answer(session=order.session)
        if before.exit_code is None and before.attempt:
            return before.model_copy(update={"exit_code": KILLED, "finished": datetime.now(UTC)})
        return before

    def _begin(self, attempt: Attempt, order: Order) -> None:
        self._tell(f"{str(attempt.stage).capitalize()}, attempt {attempt.number}.")
        self._children = self._start(attempt, Path(order.run))
        self._answer = Answer(
            session=order.session, beat=self._answer.beat, attempt=attempt.id, started=datetime.now(UTC)
        )
        self._say()

    def _note_end(self) -> None:
        """Once this machine's processes have ended, keep how."""
        if self._children is None:
            return
        pods = [pod for child in self._children.observe() for pod in child.pods]
        if any(pod.phase is PodPhase.RUNNING for pod in pods):
            return
        pod = pods[0] if pods else Pod(name="", exit_code=ASKED_TO_STOP, finished=datetime.now(UTC))
        self._children.close()
        self._children = None
        self._answer.finished, self._answer.exit_code = pod.finished, pod.exit_code
        self._answer.failure, self._answer.oom_killed = pod.failure, pod.oom_killed
        self._answer.memory_limit = pod.memory_limit
        self._say()

    def _stop(self, *, kill: bool) -> None:
        assert self._children is not None
        for child in self._children.observe():
            self._children.delete(child.stage, child.number)
        if kill:
            self._children.kill()

    def _interrupt(self) -> None:
        self._stops += 1
        self._tell("Stopping; Ctrl-C again ends everything at once." if self._stops == 1 else "Ending at once.")

    def _say(self) -> None:
        self._answer.beat += 1
        self._written = time.monotonic()
        write_json(self._board.answers(self._index), self._answer.to_wire())

    def _nobody(self, seconds: float) -> UserError:
        return UserError(
            f"Machine 0 has written nothing to {self._board.orders} for {seconds / 60:.0f} minutes: does finetune run "
            "of the same file run there, and is --workdir on a volume that all machines mount at the same path?",
            EXIT_FAILED,
        )
