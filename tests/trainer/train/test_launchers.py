"""The same program under our own launcher, under `accelerate launch` and on rented machines."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.runpod_env import runpod_variables
from tests.support.time_limits import scaled
from tests.trainer.train.jobs import DatasetOf, Job, free_port, make_job, train

from finetune_api.base import Stage
from finetune_api.rendezvous import Rendezvous
from finetune_api.runconfig import Attempt
from finetune_trainer.launch import rank_environment, wait_for_ranks

TRAINING = {"globalBatchSize": 4, "maxSteps": 2, "validateEvery": 100, "learningRate": 1e-3}
LAUNCH = [sys.executable, "-m", "finetune_trainer", "launch", "train"]


def launched(job: Job, command: list[str], attempt: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one machine's part of an attempt; of the next one, unless `attempt` says which."""
    if not attempt:
        job.attempts += 1
    number = attempt or job.attempts
    made = Attempt(uid="uid-1", stage=Stage.TRAIN, number=number, micro_batch_tokens=96)
    own = {
        "FINETUNE_RUN_CONFIG": str(job.run / "run-config.json"),
        "FINETUNE_ATTEMPT": made.model_dump_json(by_alias=True),
        "OMP_NUM_THREADS": "1",
    }
    variables = {**os.environ, **own, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=scaled(240), check=False)


def a_job(folder: Path, model: Path) -> Job:
    return make_job(folder, model, [DatasetOf("a", [20, 31, 17, 44, 25, 60])], training=TRAINING)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Job:
    """The same job, trained by two ranks that tests have forked."""
    job = a_job(tmp_path_factory.mktemp("forked"), model)
    assert train(job, 2) == [0, 0]
    return job


@pytest.mark.slow
def test_accelerate_starts_ranks_that_train_like_any_others(tmp_path: Path, model: Path, forked: Job) -> None:
    job = a_job(tmp_path, model)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", "finetune_trainer", "train"]
    run = launched(job, command)
    assert run.returncode == 0, run.stderr[-2000:]
    assert job.report().origin["worldSize"] == 2
    assert job.losses() == forked.losses()
    assert job.export_digest() == forked.export_digest()


@pytest.mark.slow
def test_rented_machines_train_by_the_variables_that_they_come_with(tmp_path: Path, model: Path, forked: Job) -> None:
    rented = a_job(tmp_path, model)
    port = free_port()
    with ThreadPoolExecutor(2) as machines:
        runs = [
            machines.submit(
                launched,
                rented,
                LAUNCH,
                attempt=1,
                **runpod_variables(index, 2, port),
            )
            for index in range(2)
        ]
    assert [run.result().returncode for run in runs] == [0, 0], runs[0].result().stderr[-2000:]
    rented.attempts = 1
    assert rented.report().origin["worldSize"] == 2
    assert rented.losses() == forked.losses()
    assert rented.export_digest() == forked.export_digest()


@pytest.mark.slow
def test_the_launcher_starts_ranks_that_train_like_any_others(tmp_path: Path, model: Path, forked: Job) -> None:
    job = a_job(tmp_path, model)
    rendezvous = Rendezvous(ranks_per_node=2, port=free_port())
    run = launched(job, LAUNCH, **rendezvous.to_environment())
    assert run.returncode == 0, run.stderr[-2000:]
    assert job.losses() == forked.losses()
    assert job.export_digest() == forked.export_digest()


JOIN = """
import sys, psutil, torch.distributed as dist
from datetime import timedelta
from finetune_trainer.process_group import join_default_group
join_default_group("gloo", int(sys.argv[1]), int(sys.argv[2]), timedelta(seconds=60))
dist.new_group(backend="gloo")
dist.barrier()
print({c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN} or "nowhere")
dist.barrier()
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_on_one_machine_listen_on_loopback_only(world_size: int) -> None:
    place = Rendezvous(ranks_per_node=world_size, port=free_port(), address="trainer-0")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, str(rank), str(world_size)],
            env=rank_environment(place, {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, rank),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in place.ranks
    ]
    heard = {rank.communicate(timeout=scaled(120))[0].strip() for rank in ranks}
    assert heard <= {"{'127.0.0.1'}", "nowhere"}, heard
    assert [rank.returncode for rank in ranks] == [0] * world_size


def test_a_failing_rank_ends_the_others_and_names_itself(tmp_path: Path) -> None:
    waiting = [sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, lambda *_: None); signal.pause()"]
    stubborn = [sys.executable, "-c", "import signal, time; signal.signal(15, lambda *_: None); time.sleep(600)"]
    ranks = [subprocess.Popen(waiting), subprocess.Popen([sys.executable, "-c", "raise SystemExit(64)"])]
    assert wait_for_ranks([*ranks, subprocess.Popen(stubborn)], 1) == 64


def test_ranks_listen_on_the_interface_of_their_machines_own_address() -> None:
    meeting = Rendezvous(nodes=2, node_rank=1, ranks_per_node=4, address="10.0.0.1", node_address="127.0.0.1")
    environ = rank_environment(meeting, {"WORLD_SIZE": "2", "PET_NNODES": "2"}, 5)
    assert environ == {
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "23456",
    }
    assert rank_environment(meeting, {"NCCL_SOCKET_IFNAME": "ib0"}, 5)["NCCL_SOCKET_IFNAME"] == "ib0"


def test_a_machine_that_does_not_know_its_place_says_so(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, [DatasetOf("a", [20, 31])], training=TRAINING)
    command = LAUNCH
    run = launched(job, command, **runpod_variables(0, 3, 1) | {"NODE_RANK": "7"})
    assert run.returncode == 64
    assert run.stderr.strip() == "error: NODE_RANK is 7, but NUM_NODES is 3: machines are numbered from 0."
