"""`finetune run` on three machines that share a directory, with a scripted trainer: who starts, stops and ends what."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.local_runs import Workspace, until
from tests.support.runpod_env import runpod_variables
from tests.support.time_limits import scaled

from finetune_api.base import Stage
from finetune_api.files import write_json
from finetune_api.rendezvous import Rendezvous
from finetune_api.runconfig import Attempt
from finetune_operator.decision.model import PodPhase
from finetune_operator.devices import Gpu, Machine
from finetune_operator.errors import UserError
from finetune_operator.local.machines import coordinator as machines
from finetune_operator.local.machines.coordinator import (
    Command,
    Coordinator,
    Machines,
    SharedDirectory,
    WorkerStatus,
    read,
)
from finetune_operator.local.machines.worker import Worker
from finetune_operator.local.processes.children import Children
from finetune_operator.local.processes.placement import place_one_of
from finetune_operator.local.processes.tokens import Tokens

COUNT = 3


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path)
    (tmp_path / "cache").mkdir()
    yield workspace
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()
    STARTED.clear()


STARTED: list[subprocess.Popen[str]] = []


def machine(workspace: Workspace, index: int, *arguments: str) -> subprocess.Popen[str]:
    """One machine's `finetune run`."""
    command = [sys.executable, "-c", "from finetune_operator.cli import main; main()", "run", "job.yaml", *arguments]
    environ = workspace.environ | runpod_variables(index, COUNT, 29500)
    process = subprocess.Popen(
        command, env=environ, cwd=workspace.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    STARTED.append(process)
    return process


def all_machines(workspace: Workspace) -> list[subprocess.Popen[str]]:
    return [machine(workspace, index) for index in range(COUNT)]


def ends(processes: list[subprocess.Popen[str]]) -> list[int]:
    for process in processes:
        process.communicate(timeout=scaled(60))
    return [process.returncode for process in processes]


def all_train(workspace: Workspace) -> None:
    """Wait until every machine has joined: who comes when machine 0 has gone waits for it to come again."""
    until(lambda: [entry["program"] for entry in workspace.trace()].count("train") == COUNT, 60)


def training(workspace: Workspace) -> list[tuple[str, str | None]]:
    return [(r.outcome, r.reason) for r in workspace.record.status.attempts if r.stage is Stage.TRAIN]


def test_machine_0_does_every_stage_and_the_others_train_with_it(workspace: Workspace) -> None:
    # The others may come first: nothing of machine 0 is there yet.
    later = [machine(workspace, 2), machine(workspace, 1)]
    assert ends([machine(workspace, 0), *later]) == [0, 0, 0]
    ran = [(entry["program"], entry["environ"].get("PET_NODE_RANK")) for entry in workspace.trace()]
    assert sorted(ran[2:5]) == [("train", "0"), ("train", "1"), ("train", "2")]
    assert [program for program, _ in ran[:2] + ran[5:]] == ["check-publish", "prepare", "evaluate", "publish"]
    trained = [entry["environ"] for entry in workspace.trace() if entry["program"] == "train"]
    assert {environ["PET_MASTER_PORT"] for environ in trained} == {"29500"}
    assert {environ["PET_NNODES"] for environ in trained} == {"3"}
    assert not any("GLOO_SOCKET_IFNAME" in environ for environ in trained)  # the launcher knows the machine's own
    (evaluated,) = [entry["environ"] for entry in workspace.trace() if entry["program"] == "evaluate"]
    assert (evaluated["PET_NNODES"], evaluated["PET_MASTER_ADDR"]) == ("1", "127.0.0.1")
    assert workspace.record.status.phase == "Complete"


def test_a_rank_that_dies_on_another_machine_is_named_and_the_attempt_is_tried_again(workspace: Workspace) -> None:
    workspace.script(
        train=[{"steps": 4, "fail": "crash", "at": 2, "sentence": "A GPU fell off the bus."}, {"steps": 4}]
    )
    assert ends(all_machines(workspace)) == [0, 0, 0]
    assert training(workspace) == [("failed", "crash"), ("succeeded", None)]
    assert "A GPU fell off the bus." in str(workspace.record.status.attempts)


def test_ctrl_c_on_machine_0_stops_all_after_a_checkpoint_and_the_same_commands_go_on(workspace: Workspace) -> None:
    workspace.script(train=[{"endless": True}, {"steps": 40}])
    running = all_machines(workspace)
    workspace.wait_for_step(5)
    all_train(workspace)
    running[0].send_signal(signal.SIGINT)
    assert ends(running) == [130, 130, 130]
    assert training(workspace) == [("suspended", "suspended")]
    assert ends(all_machines(workspace)) == [0, 0, 0]
    assert workspace.record.status.attempts[-3].resumed_from_step


def test_a_machine_that_is_stopped_is_waited_for_and_joins_again(workspace: Workspace) -> None:
    workspace.script(train=[{"endless": True}, {"steps": 5}])
    running = all_machines(workspace)
    workspace.wait_for_step(3)
    all_train(workspace)
    running[2].send_signal(signal.SIGINT)
    assert ends(running[2:]) == [130]
    until(lambda: len(training(workspace)) == 2, 30)
    assert training(workspace)[0] == ("failed", "preempted")
    assert ends([*running[:2], machine(workspace, 2)]) == [0, 0, 0]


def test_a_finished_job_ends_at_once_on_machine_0_and_the_others_learn_it(workspace: Workspace) -> None:
    assert ends(all_machines(workspace)) == [0, 0, 0]
    workers = [machine(workspace, 1), machine(workspace, 2)]
    for each in workers:
        assert each.stderr is not None
        assert "is waiting for machine 0" in each.stderr.readline()
    assert ends([machine(workspace, 0), *workers]) == [0, 0, 0]


# --- without processes -----------------------------------------------------------------------------------------------

ATTEMPT = Attempt(uid="u", stage=Stage.TRAIN, number=1)


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(machines.time, "monotonic", made)
    return made


def report(directory: SharedDirectory, coordinator: Coordinator, index: int, beat: int, **fields: object) -> None:
    session = read(directory.command_file, Command)
    assert session is not None
    wire = WorkerStatus.model_validate({"session": session.session, "beat": beat, "attempt": ATTEMPT.id} | fields)
    write_json(directory.status_file(index), wire.to_wire())
    coordinator.poll()


def test_a_machine_that_is_no_longer_heard_of_is_lost_with_its_node(tmp_path: Path, clock: Clock) -> None:
    directory, coordinator = SharedDirectory(tmp_path), Coordinator(SharedDirectory(tmp_path), Rendezvous(nodes=3))
    coordinator.command(ATTEMPT, tmp_path)
    assert [pod.phase for pod in coordinator.pods(ATTEMPT)] == [PodPhase.PENDING, PodPhase.PENDING]
    assert coordinator.pods(ATTEMPT)[1].waiting == "Machine 2 has not joined yet: run the same command there."
    report(directory, coordinator, 1, 1)
    report(directory, coordinator, 2, 1)
    assert [pod.phase for pod in coordinator.pods(ATTEMPT)] == [PodPhase.RUNNING, PodPhase.RUNNING]
    clock.now += machines.LOST_SECONDS + 1
    report(directory, coordinator, 1, 2)
    assert [pod.node_lost for pod in coordinator.pods(ATTEMPT)] == [False, True]
    report(directory, coordinator, 2, 2)
    assert not coordinator.pods(ATTEMPT)[1].node_lost


def test_status_of_an_earlier_session_is_ignored(tmp_path: Path) -> None:
    directory = SharedDirectory(tmp_path)
    write_json(directory.status_file(1), WorkerStatus(session="old", beat=7, attempt=ATTEMPT.id, exit_code=0).to_wire())
    coordinator = Coordinator(directory, Rendezvous(nodes=2))
    coordinator.command(ATTEMPT, tmp_path)
    coordinator.poll()
    assert coordinator.pods(ATTEMPT)[0].waiting


def test_an_attempt_is_gone_only_when_every_machine_has_ended_it(tmp_path: Path) -> None:
    directory, coordinator = SharedDirectory(tmp_path), Coordinator(SharedDirectory(tmp_path), Rendezvous(nodes=2))
    both = Machines(Children(tmp_path, "u", Tokens()), coordinator, tmp_path)
    coordinator.command(ATTEMPT, tmp_path)
    both._shared = ATTEMPT
    report(directory, coordinator, 1, 1)
    both.delete(Stage.TRAIN, 1)
    (child,) = both.observe()
    assert child.deleting
    assert [pod.terminating for pod in child.pods] == [True]
    assert both.alive
    report(directory, coordinator, 1, 2, exitCode=70)
    assert both.observe() == ()
    assert not both.alive


def worker(tmp_path: Path, started: list[int], over: bool = False) -> Worker:
    def start(attempt: Attempt, run: Path) -> Children:
        started.append(attempt.number)
        return Children(run, "u", Tokens(), machine=1)

    return Worker(SharedDirectory(tmp_path), 1, start, lambda _: None, lambda: over)


def test_a_command_without_a_heartbeat_is_not_carried_out(tmp_path: Path, clock: Clock) -> None:
    command = Command(session="old", beat=9, run=str(tmp_path), attempt=ATTEMPT)
    write_json(SharedDirectory(tmp_path).command_file, command.to_wire())
    started: list[int] = []
    waiting = worker(tmp_path, started)
    assert waiting.step(900) is None
    assert waiting.step(900) is None
    assert started == []
    clock.now += 901
    with pytest.raises(UserError, match=r"Machine 0 has not written to .* for 15 minutes"):
        waiting.step(900)


def test_a_machine_that_comes_after_the_end_of_a_complete_job_ends_too(tmp_path: Path, clock: Clock) -> None:
    command = Command(session="s", beat=9, run=str(tmp_path), ended=0)
    write_json(SharedDirectory(tmp_path).command_file, command.to_wire())
    late = worker(tmp_path, [], over=True)
    assert late.step(900) is None  # machine 0 may still come, to start over
    clock.now += 11
    assert late.step(900) == 0


def test_an_attempt_is_not_begun_twice_by_a_machine_that_was_started_again(tmp_path: Path, clock: Clock) -> None:
    directory = SharedDirectory(tmp_path)
    command = Command(session="s", beat=9, run=str(tmp_path), attempt=ATTEMPT)
    write_json(directory.command_file, command.to_wire())
    write_json(directory.status_file(1), WorkerStatus(session="s", beat=3, attempt=ATTEMPT.id).to_wire())
    started: list[int] = []
    again = worker(tmp_path, started)
    again.step(900)
    write_json(directory.command_file, command.model_copy(update={"beat": 10}).to_wire())
    again.step(900)
    said = read(directory.status_file(1), WorkerStatus)
    assert said is not None
    assert said.exit_code == 137
    assert started == []


def test_a_machine_with_fewer_gpus_than_a_node_has_says_so() -> None:
    from finetune_api.spec import Topology

    rendezvous = Rendezvous(nodes=3, node_rank=1)
    with pytest.raises(UserError, match=r"gpusPerNode is 4, but machine 1 has 2 GPUs"):
        place_one_of(rendezvous, Topology(gpus_per_node=4), Machine(gpus=(Gpu("0"), Gpu("1"))))
    placed = place_one_of(rendezvous, Topology(nodes=2), Machine(gpus=(Gpu("0"), Gpu("1"))))
    assert placed.nodes == 3
    assert placed.gpu_ids(1) == ("0", "1")
    assert "but there are 3 machines: running on 3" in placed.notes[0]
