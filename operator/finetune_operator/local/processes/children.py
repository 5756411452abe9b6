"""The children of a job as local processes: what the cluster's API server and kubelet are to the operator.

Kept in `children.json`, so that the next `finetune run` knows what was started. Starting twice what exists is
success; a child is gone only when every process of it is.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from finetune_api.base import ApiModel, Stage
from finetune_api.cgroup import oom_kills
from finetune_api.files import write_json
from finetune_api.report import Failure, FailureClass, Report, attempt_id
from finetune_api.runconfig import (
    LOGS_DIRECTORY,
    REPORTS_DIRECTORY,
    TERMINATION_VARIABLE,
    TOKENS_VARIABLE,
    Attempt,
    attempt_name,
)
from finetune_operator.decision.model import Child, Pod, PodPhase
from finetune_operator.local.processes import process_table
from finetune_operator.local.processes.environment import PROCESS_VARIABLE
from finetune_operator.local.processes.placement import Node
from finetune_operator.local.processes.tokens import Tokens, remove_tokens, write_tokens
from finetune_operator.programs import Program

CHILDREN_FILE = "children.json"
Environ = Callable[[Node], dict[str, str]]


class ProcessRecord(ApiModel):
    """One node of an attempt."""

    index: int
    pid: int | None = None
    step: str = ""
    tokens: str = ""
    started: datetime
    finished: datetime | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    lost: bool = False
    """It was running when `finetune run` itself was killed."""


class ChildRecord(ApiModel):
    """One attempt that was started."""

    stage: Stage
    number: int
    created: datetime
    grace_seconds: int
    processes: Annotated[list[ProcessRecord], Field(min_length=1)]


@dataclass
class _Live:
    """A node whose processes are ours to wait for."""

    node: Node
    record: ProcessRecord
    environ: Mapping[str, str]
    step: int
    process: subprocess.Popen[bytes]
    oom_kills: int


class Children:
    """Starts, watches and stops the processes of one job."""

    def __init__(self, run: Path, uid: str, tokens: Tokens, memory_limit: str = "", machine: int = 0) -> None:
        self._run, self._uid, self._tokens, self._memory_limit = run, uid, tokens, memory_limit
        # Machines that share a run directory keep their own records, and never end each other's processes.
        self._mark = f"{uid}@{machine}" if machine else uid
        self._file = run / (f"children-{machine}.json" if machine else CHILDREN_FILE)
        self._live: dict[tuple[Stage, int, int], _Live] = {}
        self._deleting: dict[tuple[Stage, int], float] = {}
        self._records = _read(self._file)

    # What is there ------------------------------------------------------------------------------------

    def observe(self) -> tuple[Child, ...]:
        """The children as they are now."""
        self._reap()
        return tuple(self._child(record) for record in self._records)

    @property
    def alive(self) -> bool:
        """Whether any of our processes is still running."""
        return bool(self._live)

    def _child(self, record: ChildRecord) -> Child:
        key = (record.stage, record.number)
        pods = tuple(self._pod(record, process) for process in record.processes)
        phases = {pod.phase for pod in pods}
        return Child(
            stage=record.stage,
            number=record.number,
            succeeded=phases == {PodPhase.SUCCEEDED},
            failed=PodPhase.FAILED in phases,
            deleting=key in self._deleting,
            created=record.created,
            pods=pods,
            pods_expected=len(pods),
        )

    def _pod(self, record: ChildRecord, process: ProcessRecord) -> Pod:
        code = process.exit_code
        running = code is None and not process.lost
        ended = PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED
        return Pod(
            name=f"{record.stage}-{record.number}/node{process.index}",
            node_rank=process.index,
            phase=PodPhase.RUNNING if running else ended,
            terminating=running and (record.stage, record.number) in self._deleting,
            oom_killed=process.oom_killed,
            memory_limit=self._memory_limit,
            # As a container's: 128 + signal for a process that was killed.
            exit_code=code if code is None or code >= 0 else 128 - code,
            failure=self._failure(record, process) if not running and code != 0 else None,
            started=process.started,
            finished=process.finished,
        )

    def _failure(self, record: ChildRecord, process: ProcessRecord) -> Failure | None:
        with contextlib.suppress(OSError, ValueError, ValidationError):
            return Failure.model_validate_json(self._termination(record, process.index).read_text())
        if not process.lost:
            return None
        return Failure(
            failure_class=FailureClass.PREEMPTED,
            sentence="`finetune run` itself was killed while this attempt was running.",
            time=process.finished or process.started,
        )

    def _logs(self, stage: Stage, number: int) -> Path:
        return self._run / LOGS_DIRECTORY / attempt_name(stage, number)

    def _termination(self, record: ChildRecord, index: int) -> Path:
        return self._logs(record.stage, record.number) / f"termination-node{index}.json"

    # What an earlier run left -------------------------------------------------------------------------

    def recover(self, tell: Callable[[str], None]) -> None:
        """Stop the processes that a killed run left, and record how their attempts ended."""
        unfinished = [(r, p) for r in self._records for p in r.processes if p.exit_code is None and not p.lost]
        grace = max((record.grace_seconds for record, _ in unfinished), default=0)
        process_table.stop_orphans(self._mark, grace or 10, tell)
        for record, process in unfinished:
            remove_tokens(process.tokens)
            process.finished = datetime.now(UTC)
            if self._reported_done(record):
                process.exit_code = 0
            else:
                process.lost = True
        if unfinished:
            self._save()

    def _reported_done(self, record: ChildRecord) -> bool:
        file = self._run / REPORTS_DIRECTORY / f"{attempt_name(record.stage, record.number)}.json"
        try:
            report = Report.model_validate_json(file.read_text())
        except (OSError, ValueError):
            return False
        return report.done and report.attempt == attempt_id(self._uid, record.stage, record.number)

    # Starting -----------------------------------------------------------------------------------------

    def start(self, attempt: Attempt, nodes: tuple[Node, ...], environ: Environ) -> None:
        """Start the processes of one attempt; nothing if that attempt has a child already."""
        if any(r.stage is attempt.stage and r.number == attempt.number for r in self._records):
            return
        self._logs(attempt.stage, attempt.number).mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC)
        processes = [ProcessRecord(index=node.index, started=now) for node in nodes]
        record = ChildRecord(
            stage=attempt.stage,
            number=attempt.number,
            created=now,
            grace_seconds=attempt.grace_seconds,
            processes=processes,
        )
        self._records.append(record)
        self._save()
        for node, process in zip(nodes, processes, strict=True):
            termination = self._termination(record, node.index)
            termination.unlink(missing_ok=True)
            variables = environ(node) | {
                TERMINATION_VARIABLE: str(termination),
                PROCESS_VARIABLE: self._marker(attempt.stage, attempt.number, node.index),
            }
            self._live[attempt.stage, attempt.number, node.index] = self._spawn(record, process, node, 0, variables)
        self._save()

    def _spawn(
        self, record: ChildRecord, process: ProcessRecord, node: Node, step: int, environ: Mapping[str, str]
    ) -> _Live:
        program = node.programs[step]
        directory = write_tokens(self._tokens, program.token)
        process.tokens, process.step = str(directory), program.name
        with self._log(record, node, program).open("ab") as log:
            popen = subprocess.Popen(
                program.command(sys.executable),
                env=dict(environ) | program.variables | {TOKENS_VARIABLE: str(directory)},
                cwd=self._run,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=process_table.end_with_parent(),
            )
        process.pid = popen.pid
        return _Live(node, process, environ, step, popen, oom_kills())

    def _marker(self, stage: Stage, number: int, index: int) -> str:
        """What every process of a node inherits, so that none is lost."""
        return f"{attempt_id(self._mark, stage, number)}/{index}"

    def _log(self, record: ChildRecord, node: Node, program: Program) -> Path:
        name = program.name if program is not node.programs[-1] else f"node{node.index}"
        return self._logs(record.stage, record.number) / f"{name}.log"

    # Waiting ------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        changed = False
        for key, live in list(self._live.items()):
            code = live.process.poll()
            if code is None:
                continue
            changed = True
            stage, number, index = key
            # What outlives its launcher may still write; a container would take it along.
            process_table.send(process_table.marked(self._marker(stage, number, index)), signal.SIGKILL)
            remove_tokens(live.record.tokens)
            record = next(r for r in self._records if r.stage is stage and r.number == number)
            following = live.step + 1
            if code == 0 and following < len(live.node.programs) and (stage, number) not in self._deleting:
                self._live[key] = self._spawn(record, live.record, live.node, following, live.environ)
                continue
            del self._live[key]
            live.record.exit_code = code
            live.record.finished = datetime.now(UTC)
            live.record.oom_killed = code == -signal.SIGKILL and oom_kills() > live.oom_kills
        self._escalate()
        if changed or self._deleting:
            self._forget_deleted()
            self._save()

    def _escalate(self) -> None:
        for (stage, number), deadline in self._deleting.items():
            if time.monotonic() >= deadline:
                self._kill(stage, number)

    def _forget_deleted(self) -> None:
        for stage, number in list(self._deleting):
            if not any(key[:2] == (stage, number) for key in self._live):
                del self._deleting[stage, number]
                self._records = [r for r in self._records if (r.stage, r.number) != (stage, number)]

    # Ending -------------------------------------------------------------------------------------------

    def delete(self, stage: Stage, number: int) -> None:
        """Ask the processes of one attempt to stop within its grace period; forget the child once they have."""
        record = next((r for r in self._records if r.stage is stage and r.number == number), None)
        if record is None or (stage, number) in self._deleting:
            return
        self._deleting[stage, number] = time.monotonic() + record.grace_seconds
        # The launcher passes it on to its ranks, as the first process of a container does.
        for key, live in self._live.items():
            if key[:2] == (stage, number):
                live.process.send_signal(signal.SIGTERM)
        self._forget_deleted()
        self._save()

    def forget(self) -> None:
        """Forget the children that have ended."""
        living = {key[:2] for key in self._live}
        self._records = [record for record in self._records if (record.stage, record.number) in living]
        self._save()

    def kill(self) -> None:
        """Kill all processes now."""
        for stage, number in {key[:2] for key in self._live}:
            self._kill(stage, number)

    def _kill(self, stage: Stage, number: int) -> None:
        process_table.send(process_table.marked(attempt_id(self._mark, stage, number)), signal.SIGKILL)
        for key, live in self._live.items():
            if key[:2] == (stage, number):
                live.process.kill()

    def close(self) -> None:
        """Kill what is still running, wait for it, and leave no token behind."""
        self.kill()
        for live in self._live.values():
            live.process.wait()
            remove_tokens(live.record.tokens)

    def _save(self) -> None:
        write_json(self._file, [record.to_wire() for record in self._records])


def _read(file: Path) -> list[ChildRecord]:
    try:
        return [ChildRecord.model_validate(entry) for entry in json.loads(file.read_text())]
    except (OSError, ValueError):
        return []
