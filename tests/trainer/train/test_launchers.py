"""The same program under `accelerate launch` and on rented machines; pods and `finetune run` start it by torchrun."""

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
from finetune_trainer.launch import command_of

TRAINING = {"globalBatchSize": 4, "maxSteps": 2, "validateEvery": 100, "learningRate": 1e-3}


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
                [sys.executable, "-m", "finetune_trainer", "launch", "train"],
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


def test_ranks_listen_on_the_interface_of_their_machines_own_address(tmp_path: Path) -> None:
    attempt = Attempt(uid="uid-1", stage=Stage.TRAIN)
    meeting = Rendezvous(nodes=2, node_rank=1, ranks_per_node=4, address="10.0.0.1", node_address="127.0.0.1")
    command, environ = command_of("train", meeting, {"WORLD_SIZE": "8", "PET_NNODES": "2"}, attempt)
    assert environ["NCCL_SOCKET_IFNAME"] == environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert not any(name.startswith("PET_") for name in environ)
    assert " ".join(command).endswith(
        "--rdzv-backend static --max-restarts 0 --nnodes 2 --node-rank 1 --nproc-per-node 4 "
        "--master-addr 10.0.0.1 --master-port 23456 --rdzv-conf timeout=900 -m finetune_trainer train"
    )
    _, given = command_of("train", meeting, {"NCCL_SOCKET_IFNAME": "ib0"}, attempt)
    assert given["NCCL_SOCKET_IFNAME"] == "ib0"


def test_a_machine_that_does_not_know_its_place_says_so(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, [DatasetOf("a", [20, 31])], training=TRAINING)
    command = [sys.executable, "-m", "finetune_trainer", "launch", "train"]
    run = launched(job, command, **runpod_variables(0, 3, 1) | {"NODE_RANK": "7"})
    assert run.returncode == 64
    assert run.stderr.strip() == "error: NODE_RANK is 7, but NUM_NODES is 3: machines are numbered from 0."
