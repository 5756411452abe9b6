"""Several machines that carry out one job without Kubernetes, over a directory that all of them mount.

Machine 0, the coordinator, decides as it would alone, and writes commands to `machines/command.json` beside the job's
runs. The others (worker.py) start and stop their launcher as commanded, and report in `machines/<k>.json` how it went.
Both sides write a rising heartbeat count, so that no clocks are compared: who stops counting is lost.
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

HEARTBEAT_SECONDS = 2.0
LOST_SECONDS = 60.0
"""Without a heartbeat for this long, a machine counts as lost. A network file system may lag by some seconds."""

Message = TypeVar("Message", bound=ApiModel)


class Command(ApiModel):
    """What machine 0 wants the others to run."""

    session: str
    """One `finetune run` of machine 0; files of earlier ones are ignored."""
    beat: int = 0
    run: str = ""
    """The run directory."""
    attempt: Attempt | None = None
    """The attempt that should run; None: nothing should."""
    kill: bool = False
    """Do not wait for a checkpoint."""
    ended: int | None = None
    """Exit code of machine 0, once it has ended."""


class WorkerStatus(ApiModel):
    """What another machine reports of the attempt that it was commanded to run."""

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
class Heartbeat:
    """Whether another machine is alive, by this machine's monotonic clock."""

    last: tuple[str, int] | None = None
    since: float = field(default_factory=time.monotonic)
    moved: bool = False
    """The count has changed since it was first read."""

    @property
    def alive(self) -> bool:
        """The other machine is there now. A file that never changed may be of a run that is long over."""
        return self.moved and self.silent_seconds <= LOST_SECONDS

    def record(self, session: str, beat: int) -> None:
        """Note the count that was read."""
        if (session, beat) != self.last:
            self.moved = self.last is not None
            self.last, self.since = (session, beat), time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """How long the count has not changed."""
        return time.monotonic() - self.since


@dataclass(frozen=True)
class SharedDirectory:
    """The files between the machines of one job."""

    directory: Path

    @property
    def command_file(self) -> Path:
        """Written by machine 0."""
        return self.directory / "machines" / "command.json"

    def status_file(self, index: int) -> Path:
        """Written by machine `index`."""
        return self.directory / "machines" / f"{index}.json"


def read(file: Path, model: type[Message]) -> Message | None:
    """A message; None if there is none yet, or none that can be read."""
    try:
        return model.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return None


class Coordinator:
    """Machine 0's side: commands the others, and reads their status."""

    def __init__(self, directory: SharedDirectory, rendezvous: Rendezvous) -> None:
        self._directory, self.rendezvous = directory, rendezvous
        self._command = Command(session=uuid.uuid4().hex)
        self._written = 0.0
        self._heartbeats = {index: Heartbeat() for index in range(1, rendezvous.nodes)}
        self._statuses: dict[int, WorkerStatus] = {}

    @contextmanager
    def session(self) -> Iterator[None]:
        """Tell the others when this machine ends, in whatever way; `end` gives the exit code."""
        self._write()
        try:
            yield
        finally:
            if self._command.ended is None:
                self.end(EXIT_FAILED)

    def end(self, code: int) -> None:
        """Have the others end too, with this code."""
        self._change(ended=code, attempt=None)

    def command(self, attempt: Attempt | None, run: Path | None = None, *, kill: bool = False) -> None:
        """Have the others run an attempt in a run directory, or none."""
        self._change(attempt=attempt, run=str(run or ""), kill=kill)

    def poll(self) -> None:
        """Write a heartbeat, and read the status of the others."""
        if time.monotonic() - self._written >= HEARTBEAT_SECONDS:
            self._write()
        for index, heartbeat in self._heartbeats.items():
            status = read(self._directory.status_file(index), WorkerStatus)
            if status is not None and status.session == self._command.session:
                heartbeat.record(status.session, status.beat)
                self._statuses[index] = status

    def pods(self, attempt: Attempt) -> tuple[Pod, ...]:
        """An attempt's nodes on the other machines."""
        return tuple(self._pod(index, attempt) for index in self._heartbeats)

    def _pod(self, index: int, attempt: Attempt) -> Pod:
        pod = Pod(name=f"{attempt.stage}-{attempt.number}/node{index}", node_rank=index, node=f"machine {index}")
        status = self._statuses.get(index)
        if status is None:
            return replace(pod, waiting=f"Machine {index} has not joined yet: run the same command there.")
        lost = self._heartbeats[index].silent_seconds > LOST_SECONDS
        if status.attempt != attempt.id:
            waiting = f"Machine {index} has not started this attempt yet."
            return replace(pod, waiting=waiting, node_lost=lost, out_of_service=lost)
        code = status.exit_code
        ended = PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED
        return replace(
            pod,
            phase=PodPhase.RUNNING if code is None else ended,
            node_lost=lost and code is None,
            # A machine that cannot reach the directory cannot write to it either, and kills its ranks when it notices.
            out_of_service=lost and code is None,
            oom_killed=status.oom_killed,
            memory_limit=status.memory_limit,
            exit_code=code,
            failure=status.failure,
            started=status.started,
            finished=status.finished,
        )

    def _change(self, **fields: object) -> None:
        self._command = self._command.model_copy(update=fields)
        self._write()

    def _write(self) -> None:
        self._command = self._command.model_copy(update={"beat": self._command.beat + 1})
        self._written = time.monotonic()
        write_json(self._directory.command_file, self._command.to_wire())


class Machines:
    """The children of a job on machine 0 and on the others, with the interface of `Children`."""

    def __init__(self, own: Children, coordinator: Coordinator, run: Path) -> None:
        self._own, self._coordinator, self._run = own, coordinator, run
        self._shared: Attempt | None = None
        self._deleting = False

    def recover(self, tell: Callable[[str], None]) -> None:
        """Stop what an earlier run left here; the other machines do so before they start anything."""
        self._own.recover(tell)

    def observe(self) -> tuple[Child, ...]:
        """The children as they are now, on all machines."""
        self._coordinator.poll()
        own = self._own.observe()
        if self._shared is None:
            return own
        attempt = self._shared
        pods = self._coordinator.pods(attempt)
        mine = [child for child in own if (child.stage, child.number) == (attempt.stage, attempt.number)]
        rest = tuple(child for child in own if child not in mine)
        if mine:
            return (*rest, self._on_all_machines(mine[0], pods))
        if any(_runs(pod) for pod in pods):  # deleted, and another machine is not done
            gone = Child(attempt.stage, attempt.number, deleting=True, pods_expected=len(pods) + 1)
            return (*rest, replace(gone, pods=tuple(replace(pod, terminating=True) for pod in pods if _runs(pod))))
        self._shared, self._deleting = None, False
        return rest

    def _on_all_machines(self, own: Child, others: tuple[Pod, ...]) -> Child:
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
        """Whether any process is still running, as far as is known."""
        return self._own.alive or (self._shared is not None and any(map(_runs, self._coordinator.pods(self._shared))))

    def start(self, attempt: Attempt, nodes: tuple[Node, ...], environ: Environ) -> None:
        """Start this machine's node, and have the others start theirs."""
        if len(nodes) > 1:
            self._shared, self._deleting = attempt, False
            self._coordinator.command(attempt, self._run)
        self._own.start(attempt, nodes[:1], environ)

    def delete(self, stage: Stage, number: int) -> None:
        """Ask an attempt's processes to stop, on all machines."""
        if self._shared is not None and (stage, number) == (self._shared.stage, self._shared.number):
            self._deleting = True
            self._coordinator.command(None)
        self._own.delete(stage, number)

    def forget(self) -> None:
        """Forget the children that have ended."""
        self._own.forget()

    def kill(self) -> None:
        """Kill all processes now, on all machines."""
        self._coordinator.command(None, kill=True)
        self._own.kill()

    def close(self) -> None:
        """Kill what is still running here; the others stop theirs when this machine ends."""
        self._own.close()


def _runs(pod: Pod) -> bool:
    return pod.phase is PodPhase.RUNNING and not pod.out_of_service
