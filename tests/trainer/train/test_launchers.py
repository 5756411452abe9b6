"""The same program under `accelerate launch`; under torchrun it is started by every `finetune run`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.trainer.train.jobs import DatasetOf, Job, free_port, make_job, train

from finetune_api.base import Stage
from finetune_api.runconfig import Attempt

TRAINING = {"globalBatchSize": 4, "maxSteps": 2, "validateEvery": 100, "learningRate": 1e-3}


def launched(job: Job, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    job.attempts += 1
    attempt = Attempt(uid="uid-1", stage=Stage.TRAIN, number=job.attempts, micro_batch_tokens=96)
    own = {
        "FINETUNE_RUN_CONFIG": str(job.run / "run-config.json"),
        "FINETUNE_ATTEMPT": attempt.model_dump_json(by_alias=True),
        "OMP_NUM_THREADS": "1",
    }
    variables = {**os.environ, **own, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_accelerate_starts_ranks_that_train_like_any_others(tmp_path: Path, model: Path) -> None:
    forked, job = (
        make_job(tmp_path / name, model, [DatasetOf("a", [20, 31, 17, 44, 25, 60])], training=TRAINING)
        for name in ("forked", "accelerate")
    )
    assert train(forked, 2) == [0, 0]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", "finetune_trainer", "train"]
    run = launched(job, command)
    assert run.returncode == 0, run.stderr[-2000:]
    assert job.report().origin["worldSize"] == 2
    assert job.losses() == forked.losses()
    assert job.export_digest() == forked.export_digest()
