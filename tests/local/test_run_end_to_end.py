"""`finetune run` with the real trainer: a gated random Llama learns two words, is stopped, goes on, is published."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.hub_server import HubServer, hub_environment
from tests.support.local_runs import until
from tests.support.time_limits import scaled
from tests.support.tiny import tiny_llama

TOKEN = "hf_alice_reads"
JOB: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "days"},
    "spec": {
        "model": {"repo": "meta/random"},
        "datasets": [{"name": "days", "path": "days.csv", "task": "classification"}],
        "split": {"validation": 0.1, "test": 0.3},
        "tuning": {"method": "full"},
        "training": {
            "epochs": 10,
            "learningRate": 3.0e-3,
            "maxGradNorm": 10,
            "globalBatchSize": 16,
            "maxSequenceLength": 256,
            "precision": "fp32",
        },
        "topology": {"nodes": 2, "gpusPerNode": 0},
        "publish": {"path": "published"},
    },
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_token(TOKEN, user="alice")
        server.add_repo("meta/random", tiny_llama(tmp_path / "model"), gated=True, consented=("alice",))
        yield server


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    chance = random.Random(0)
    with (tmp_path / "days.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for day in range(240):
            label = ("good", "bad")[day % 2]
            word = chance.choice({"good": ["lovely", "great", "nice"], "bad": ["awful", "sad", "ugly"]}[label])
            rows.writerow([f"a {word} day {day} {chance.random():.6f}", label])
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    return tmp_path


def start(workspace: Path, hub: HubServer, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from finetune_operator.cli import main; main()", "run", "job.yaml", *arguments]
    environ = os.environ | {"FINETUNE_CACHE": str(workspace / "cache"), "OMP_NUM_THREADS": "1"}
    environ |= hub_environment(hub, workspace / "home", TOKEN)
    return subprocess.Popen(
        command, cwd=workspace, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def trained_to(workspace: Path, step: int) -> bool:
    files = list(workspace.glob("runs/default/days/*/metrics/train.jsonl"))
    return bool(files) and f'"step": {step},' in files[0].read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_is_trained_stopped_resumed_evaluated_and_published(workspace: Path, hub: HubServer) -> None:
    first = start(workspace, hub)
    until(lambda: trained_to(workspace, 10) or first.poll() is not None, seconds=400)
    first.send_signal(signal.SIGINT)
    said, errors = first.communicate(timeout=scaled(200))
    assert first.returncode == 130, said + errors
    assert "the same command resumes it from step" in errors

    hub.stop()
    second = start(workspace, hub, "--output", "json")
    said, errors = second.communicate(timeout=scaled(400))
    assert second.returncode == 0, said[-2000:] + errors
    resource = json.loads(said.splitlines()[-1])["resource"]
    status = resource["status"]

    stopped, resumed = [attempt for attempt in status["attempts"] if attempt["stage"] == "train"]
    assert (stopped["outcome"], stopped["counted"]) == ("suspended", False)
    assert resumed["resumedFromStep"] >= 10
    tuned = status["results"]["metrics"][0]
    assert tuned["tuned"] > tuned["base"]
    assert tuned["difference"]["low"] > 0
    assert set(tuned["baselines"]) >= {"majority", "tfidf-logreg"}
    assert status["results"]["exportDigest"] == status["export"]["digest"] == status["published"]["digest"]
    run = workspace / "runs" / "default" / "days" / resource["metadata"]["uid"]
    assert (run / status["results"]["report"]).is_file()
    assert (workspace / "published" / "README.md").is_file()
    kept = (file for place in ("runs", "cache", "published") for file in (workspace / place).rglob("*"))
    assert not [file for file in kept if file.is_file() and TOKEN.encode() in file.read_bytes()]
    steps = [
        json.loads(line)["step"]
        for line in (run / "metrics" / "train.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert sorted(set(steps)) == list(range(1, 91))
