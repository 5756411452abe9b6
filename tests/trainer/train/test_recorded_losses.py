"""Training computes the losses that were recorded earlier, so moving code does not change what is computed.

On the kind of machine that recorded them they must be equal to the bit; other processors and other releases of torch
round differently. `FINETUNE_RECORD_LOSSES=1` records the losses of this machine next to those of others.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.assets import smollm2_directory
from tests.trainer.train.hooks import losses_only
from tests.trainer.train.jobs import DatasetOf, Job, make_job, start

RECORDED = Path(__file__).with_name("recorded_losses.json")
OTHER_MACHINE_TOLERANCE = 1e-4
LENGTHS = [20, 31, 17, 44, 25, 60, 13, 38, 29, 41, 9, 90, 22, 35, 51]
DATASETS = [DatasetOf("a", LENGTHS, prefix=9), DatasetOf("b", LENGTHS[::-1], labelled=2, weight=0.6, loss_weight=2)]
TRAINING = {"packing": True, "globalBatchSize": 8, "learningRate": 2e-3, "lossReduction": "example"}


def fingerprint() -> str:
    """What rounding depends on: the release of torch and the processor's instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split("\t:" if "\t:" in line else ":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx")))
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join(
        [f"torch {torch.__version__}", facts.get("model name", "?"), capability, *flags, "1 thread per rank"]
    )


def numbers_of(job: Job) -> dict[str, Any]:
    """The numbers of a finished job."""
    validations = [row["validation"] for row in job.validations()]
    return {
        "losses": job.losses(),
        "gradient norms": [row["gradNorm"] for row in job.rows()],
        "validation losses": [each["loss"] for each in validations],
        "validation losses by dataset": [of["loss"] for each in validations for of in each["datasets"].values()],
        "validation accuracies": [each["accuracy"] for each in validations],
    }


def check(name: str, numbers: dict[str, Any]) -> None:
    """Compare the numbers with the recorded ones, or record them."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("FINETUNE_RECORD_LOSSES"):
        recorded.setdefault(fingerprint(), {})[name] = numbers
        RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    elif fingerprint() in recorded:
        assert numbers == recorded[fingerprint()][name]
    else:
        for key, values in next(iter(recorded.values()))[name].items():
            assert numbers[key] == pytest.approx(values, rel=OTHER_MACHINE_TOLERANCE)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tiny_model_has_the_recorded_losses(tmp_path: Path, model: Path, method: str) -> None:
    for ranks in (1, 2):
        training = {**TRAINING, "maxSteps": 6, "validateEvery": 3}
        tuning = {"method": method, "lora": {"rank": 4}} if method == "lora" else {"method": method}
        job = make_job(tmp_path / f"{ranks}", model, DATASETS, training=training, tuning=tuning)
        assert start(job, ranks).wait() == [0] * ranks
        check(f"tiny, {method}, ranks {ranks}", numbers_of(job))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_smollm2_has_the_recorded_losses(tmp_path: Path, method: str) -> None:
    training = {**TRAINING, "globalBatchSize": 4, "learningRate": 1e-4, "maxSteps": 2, "validationRows": 4}
    tuning = {"method": method}
    job = make_job(tmp_path, smollm2_directory(), DATASETS, training=training, tuning=tuning)
    assert start(job, hook=losses_only).wait() == [0]
    check(f"SmolLM2-135M, {method}", numbers_of(job))
