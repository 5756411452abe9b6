"""Several machines that carry out one job without Kubernetes, over a directory that all of them mount.

Machine 0 decides, as it would alone; its orders lie in `machines/order.json` beside the job's runs. The others
(follower.py) start their launcher when an attempt is ordered, stop it when told so, and say in `machines/<k>.json`
how it went. Both sides write a rising count of beats, so that no clock is compared: who no longer beats is gone.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finetune_api.base import ApiModel, Stage
from finetune_api.files import write_json
from finetune_api.rendezvous import Rendezvous
from finetune_api.report import Failure
from finetune_api.runconfig import Attempt
from finetune_operator.decision.model import Child, Pod, PodPhase
from finetune_operator.errors import EXIT_FAILED
from finetune_operator.local.processes.children import Children, Environ
from finetune_operator.local.processes.placement import Node

BEAT_SECONDS = 2.0
LOST_SECONDS = 60.0
"""Without a beat for so long, a machine counts as gone. Directories over a network may lag by some seconds."""

Message = TypeVar("Message", bound=ApiModel)


class Order(ApiModel):
    """What machine 0 wants of the others."""

    session: str
    """One `finetune run` of machine 0; what earlier ones left is not meant."""
    beat: int = 0
    run: str = ""
    """The run directory."""
    attempt: Attempt | None = None
    """The attempt that should run; none: nothing should."""
    kill: bool = False
    """Do not wait for a checkpoint."""
    ended: int | None = None
    """Exit code of machine 0, once it has ended."""


class Answer(ApiModel):
    """What another machine says of the attempt that was ordered."""

    session: str
    beat: int = 0
    attempt: str = ""
    """Id of the attempt that it started last."""
    started: datetime | None = None
    finished: datetime | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    memory_limit: str = ""
    failure: Failure | None = None


@dataclass
class Pulse:
    """Whether somebody still beats, by this machine's monotonic clock."""

    last: tuple[str, int] | None = None
    since: float = field(default_factory=time.monotonic)
    moved: bool = False
    """It has changed since it was first looked at."""

    @property
    def beats(self) -> bool:
        """Somebody is there now. What lies there unchanged may be of a run that is long over."""
        return self.moved and self.silent_seconds <= LOST_SECONDS

    def feel(self, session: str, beat: int) -> None:
        """Note the count that was read."""
        if (session, beat) != self.last:
            self.moved = self.last is not None
            self.last, self.since = (session, beat), time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """How long nothing new was read."""
        return time.monotonic() - self.since


@dataclass(frozen=True)
class Board:
    """The files between the machines of one job."""

    directory: Path

    @property
    def orders(self) -> Path:
        """What machine 0 writes."""
        return self.directory / "machines" / "order.json"

    def answers(self, index: int) -> Path:
        """What machine `index` writes."""
        return self.directory / "machines" / f"{index}.json"


def read(file: Path, model: type[Message]) -> Message | None:
    """A message; None if there is none yet, or none that can be read."""
    try:
        return model.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return None


class Lead:
    """Machine 0's side: orders, and what the others answered."""

    def __init__(self, board: Board, meeting: Rendezvous) -> None:
        self._board, self.meeting = board, meeting
        self._order = Order(session=uuid.uuid4().hex)
        self._written = 0.0
        self._pulses = {index: Pulse() for index in range(1, meeting.nodes)}
        self._answers: dict[int, Answer] = {}

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Tell the others when this machine ends, however it does; `end` says the exit code."""
        self._write()
        try:
            yield
        finally:
            if self._order.ended is None:
                self.end(EXIT_FAILED)

    def end(self, code: int) -> None:
        """The others end too, with this code."""
        self._change(ended=code, attempt=None)

    def order(self, attempt: Attempt | None, run: Path | None = None, *, kill: bool = False) -> None:
        """Have an attempt run, in a run directory, or none."""
        self._change(attempt=attempt, run=str(run or ""), kill=kill)

    def look(self) -> None:
        """Beat, and read the answers."""
        if time.monotonic() - self._written >= BEAT_SECONDS:
            self._write()
        for index, pulse in self._pulses.items():
            answer = read(self._board.answers(index), Answer)
            if answer is not None and answer.session == self._order.session:
                pulse.feel(answer.session, answer.beat)
                self._answers[index] = answer

    def pods(self, attempt: Attempt) -> tuple[Pod, ...]:
        """What runs of an attempt on the other machines."""
        return tuple(self._pod(index, attempt) for index in self._pulses)

    def _pod(self, index: int, attempt: Attempt) -> Pod:
        pod = Pod(name=f"{attempt.stage}-{attempt.number}/node{index}", index=index, node=f"machine {index}")
        answer = self._answers.get(index)
        if answer is None:
            return replace(pod, waiting=f"Machine {index} has not joined: start the same command there.")
        lost = self._pulses[index].silent_seconds > LOST_SECONDS
        if answer.attempt != attempt.id:
            return replace(pod, waiting=f"Machine {index} has not started yet.", node_lost=lost, out_of_service=lost)
        code = answer.exit_code
        ended = PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED
        return replace(
            pod,
            phase=PodPhase.RUNNING if code is None else ended,
            node_lost=lost and code is None,
            # Whoever cannot reach the directory cannot write to it either, and its ranks are ended as it notices.
            out_of_service=lost and code is None,
            oom_killed=answer.oom_killed,
            memory_limit=answer.memory_limit,
            exit_code=code,
            failure=answer.failure,
            started=answer.started,
            finished=answer.finished,
        )

    def _change(self, **fields: object) -> None:
        self._order = self._order.model_copy(update=fields)
        self._write()

    def _write(self) -> None:
        self._order = self._order.model_copy(update={"beat": self._order.beat + 1})
        self._written = time.monotonic()
        write_json(self._board.orders, self._order.to_wire())


class Machines:
    """The children of a job on this machine, 0, and on the others: what `Children` is to one machine."""

    def __init__(self, own: Children, lead: Lead, run: Path) -> None:
        self._own, self._lead, self._run = own, lead, run
        self._shared: Attempt | None = None
        self._deleting = False

    def recover(self, tell: Callable[[str], None]) -> None:
        """End what an earlier run left here; the other machines do so before they start anything."""
        self._own.recover(tell)

    def observe(self) -> tuple[Child, ...]:
        """The children as they are now, on all machines."""
        self._lead.look()
        own = self._own.observe()
        if self._shared is None:
            return own
        attempt = self._shared
        pods = self._lead.pods(attempt)
        mine = [child for child in own if (child.stage, child.number) == (attempt.stage, attempt.number)]
        rest = tuple(child for child in own if child not in mine)
        if mine:
            return (*rest, self._whole(mine[0], pods))
        if any(_runs(pod) for pod in pods):  # deleted, and another machine is not done
            gone = Child(attempt.stage, attempt.number, deleting=True, pods_expected=len(pods) + 1)
            return (*rest, replace(gone, pods=tuple(replace(pod, terminating=True) for pod in pods if _runs(pod))))
        self._shared, self._deleting = None, False
        return rest

    def _whole(self, own: Child, others: tuple[Pod, ...]) -> Child:
        pods = (*own.pods, *(replace(pod, terminating=self._deleting and _runs(pod)) for pod in others))
        phases = {pod.phase for pod in pods}
        return replace(
            own,
            pods=pods,
            pods_expected=len(pods),
            succeeded=phases == {PodPhase.SUCCEEDED},
            failed=PodPhase.FAILED in phases,
        )

    @property
    def alive(self) -> bool:
        """Whether any process still runs, as far as is known."""
        return self._own.alive or (self._shared is not None and any(map(_runs, self._lead.pods(self._shared))))

    def start(self, attempt: Attempt, nodes: tuple[Node, ...], environ: Environ) -> None:
        """Start this machine's node, and have the others start theirs."""
        if len(nodes) > 1:
            self._shared, self._deleting = attempt, False
            self._lead.order(attempt, self._run)
        self._own.start(attempt, nodes[:1], environ)

    def delete(self, stage: Stage, number: int) -> None:
        """Ask an attempt's processes to end, everywhere."""
        if self._shared is not None and (stage, number) == (self._shared.stage, self._shared.number):
            self._deleting = True
            self._lead.order(None)
        self._own.delete(stage, number)

    def forget(self) -> None:
        """Forget the children that have ended."""
        self._own.forget()

    def kill(self) -> None:
        """End everything at once."""
        self._lead.order(None, kill=True)
        self._own.kill()

    def close(self) -> None:
        """End what still runs here; the others end theirs when this machine ends."""
        self._own.close()


def _runs(pod: Pod) -> bool:
    return pod.phase is PodPhase.RUNNING and not pod.out_of_service
