"""Small prepared jobs, and ranks that train them: processes forked from a server that has torch imported already."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import multiprocessing.process
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tests.support.ranks import FORK_SERVER_IMPORTS
from tests.support.time_limits import scaled

from finetune_api.base import Stage
from finetune_api.report import Report
from finetune_api.runconfig import Attempt, JobRef, Paths, RunConfig, resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_api.traits import Task
from finetune_trainer.data.documents import DocumentWriter
from finetune_trainer.data.manifest import PreparedDataset, PreparedManifest, PreparedModel, Span

PAD, END = 3, 2
VOCABULARY = 260
os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the server: a fork keeps no threads
FORKED = multiprocessing.get_context("forkserver")


@dataclass
class DatasetOf:
    """One dataset of a job: documents of these many tokens, the last `labelled` of them labelled."""

    name: str
    lengths: Sequence[int]
    labelled: int | None = None
    task: Task = Task.CLASSIFICATION
    weight: float = 1.0
    loss_weight: float = 1.0
    contrary: bool = False
    """Validation has other answers: what is learnt makes it worse."""
    prefix: int = 0
    """Tokens that all its documents begin with, as far as they are not labelled."""


@dataclass
class Job:
    """A job that is prepared and can be trained, attempt after attempt."""

    root: Path
    model: Path
    spec: dict[str, Any]
    attempts: int = 0
    attempt_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.root / "run"

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints."""
        return self.run / "checkpoints"

    def configure(self, **spec: Any) -> None:
        """Write the run config, with these blocks of the spec changed; products are in float32 by default."""
        self.spec = {**self.spec, **spec}
        self.spec["training"] = {"precision": "fp32", **self.spec.get("training", {})}
        config = RunConfig(
            job=JobRef(namespace="default", name="job", uid="uid-1"),
            spec=resolve(FineTuneJobSpec.model_validate(self.spec)),
            paths=Paths(run=str(self.run), cache=str(self.root / "cache"), source=str(self.root)),
        )
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "run-config.json").write_text(config.model_dump_json(by_alias=True))

    def copy(self, root: Path) -> Job:
        """The same job as it stands, in another place."""
        shutil.copytree(self.run, root / "run", dirs_exist_ok=True)
        other = Job(root, self.model, self.spec, self.attempts)
        other.configure()
        return other

    def report(self) -> Report:
        """What the newest attempt said."""
        return Report.model_validate_json((self.run / "reports" / f"train-{self.attempts}.json").read_text())

    def rows(self) -> list[dict[str, Any]]:
        """The curve: one row per step."""
        return [row for row in self._metrics() if "loss" in row]

    def steps_done(self) -> int:
        """The last step of the curve, whose last line may be cut."""
        file = self.run / "metrics" / "train.jsonl"
        return file.read_text().count('"loss"') if file.exists() else 0

    def validations(self) -> list[dict[str, Any]]:
        """The validation rows."""
        return [row for row in self._metrics() if "validation" in row]

    def _metrics(self) -> list[dict[str, Any]]:
        file = self.run / "metrics" / "train.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def losses(self) -> list[float]:
        """Training losses, step by step."""
        return [row["loss"] for row in self.rows()]

    def export_digest(self) -> str:
        """sha256 over the exported weights."""
        digest = hashlib.sha256()
        for file in sorted((self.run / "export").rglob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def saved(self) -> list[int]:
        """Steps of the published checkpoints."""
        return sorted(int(path.name[5:]) for path in self.checkpoints.glob("step-????????"))


def make_job(
    root: Path, model: Path, datasets: Sequence[DatasetOf], *, nf4: Path | None = None, validation: int = 6, **spec: Any
) -> Job:
    """Prepare a job with random documents of the given lengths; `spec` are blocks such as `training={...}`."""
    random = np.random.default_rng(7)
    prepared = root / "run" / "prepared"
    for split in ("train", "validation"):
        with DocumentWriter(prepared / split) as writer:
            for index, dataset in enumerate(datasets):
                beginning = np.random.default_rng([index, dataset.prefix]).integers(4, VOCABULARY, dataset.prefix)
                lengths = dataset.lengths if split == "train" else list(dataset.lengths)[:validation]
                for row, length in enumerate(lengths):
                    labelled = min(dataset.labelled or length // 2, length - 1)
                    ids = random.integers(4, VOCABULARY, length)
                    shared = min(dataset.prefix, length - labelled)
                    ids[:shared] = beginning[:shared]
                    contrary = dataset.contrary and split == "validation"
                    ids[-labelled:] = 10 + 7 * index + contrary  # something that can be learnt
                    positions = np.arange(length - labelled - 1, length - 1)
                    writer.add(ids, positions, ids[positions + 1], dataset=index, row=row)
    tokens = sum(sum(dataset.lengths) for dataset in datasets)
    span = Span(documents=sum(len(d.lengths) for d in datasets), tokens=tokens, labelled=0, longest=0)
    PreparedManifest(
        config_digest="c",
        model=PreparedModel(
            directory=str(model), source="tiny", digest="digest-of-the-base", nf4_directory=nf4 and str(nf4)
        ),
        tokenizer=str(model),
        pad_token_id=PAD,
        end_token_ids=[END],
        datasets=[
            PreparedDataset(
                index=i,
                name=d.name,
                task=d.task,
                source="made",
                train=len(d.lengths),
                validation=min(validation, len(d.lengths)),
                test=0,
                weight=d.weight,
                loss_weight=d.loss_weight,
            )
            for i, d in enumerate(datasets)
        ],
        train=span,
        validation=span,
        evaluation_split="validation",
        digest="digest-of-the-data",
    ).write(prepared)
    (prepared / "tokenizer").mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model / file).exists():
            (prepared / "tokenizer" / file).write_bytes((model / file).read_bytes())
    wire: dict[str, Any] = {
        "model": {"path": str(model)},
        "datasets": [
            {"name": d.name, "path": "rows.jsonl", "task": d.task, "weight": d.weight, "lossWeight": d.loss_weight}
            for d in datasets
        ],
        "tuning": {"method": "lora", "lora": {"rank": 4}},
        "topology": {"gpusPerNode": 0},
        "checkpoint": {"everyMinutes": 1000},
    }
    job = Job(root, model, {**wire, **spec})
    job.configure()
    return job


Hook = Callable[[], None]


@dataclass
class Ranks:
    """The processes of one attempt."""

    processes: list[multiprocessing.process.BaseProcess]

    def wait(self, seconds: float = 120) -> list[int]:
        """Their exit codes; kills what is left after the time."""
        deadline = time.monotonic() + scaled(seconds)
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode or 0 for process in self.processes]

    @property
    def alive(self) -> bool:
        """Whether all of them run."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def start(
    job: Job, ranks: int = 1, hook: Hook | None = None, ranks_per_node: int | None = None, **attempt: Any
) -> Ranks:
    """Start the next attempt on so many ranks; `hook` (importable) runs in each before training."""
    job.attempts += 1
    patience = math.ceil(scaled(60))
    limits = {"startupSeconds": patience, "hangSeconds": patience}
    fields = {**limits, "microBatchTokens": 96, **job.attempt_fields, **attempt}
    wire = Attempt(uid="uid-1", stage=Stage.TRAIN, number=job.attempts, **_snake(fields)).model_dump_json(by_alias=True)
    port = free_port()
    # The server is one for the whole process: said here, and not at import, this is what its first user wants.
    FORKED.set_forkserver_preload(FORK_SERVER_IMPORTS)
    processes = []
    for rank in range(ranks):
        environment = {
            "FINETUNE_RUN_CONFIG": str(job.run / "run-config.json"),
            "FINETUNE_ATTEMPT": wire,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks_per_node or ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = FORKED.Process(target=train_rank, args=(environment, hook), daemon=True)
        process.start()
        processes.append(process)
    return Ranks(processes)


def train(job: Job, ranks: int = 1, hook: Hook | None = None, **attempt: Any) -> list[int]:
    """One attempt from start to end; the ranks' exit codes."""
    return start(job, ranks, hook, **attempt).wait()


def train_rank(environment: Mapping[str, str], hook: Hook | None) -> None:
    """What one process does."""
    os.environ.update(environment)
    import torch

    os.chdir(Path(environment["FINETUNE_RUN_CONFIG"]).parent)  # where the kernel leaves the core of a rank that aborts
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    torch.set_num_threads(1)
    if hook is not None:
        hook()
    from finetune_trainer.__main__ import main

    code = main(["train"])
    os._exit(code)


def _snake(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"".join(f"_{c.lower()}" if c.isupper() else c for c in key): value for key, value in fields.items()}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
