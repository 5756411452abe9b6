"""From a process's start to its first step or answer, by part; and which libraries the imports spend their time on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, spread
from benchmarks.workers import QUIET, ROOT

from finetune_api.base import Stage

STARTED_VARIABLE = "BENCHMARK_STARTED"
IMPORT_TRAIN = "from finetune_trainer import __main__ as p; p.import_stage(p.context_from_environment(), 'train')"
BEGINNING = ("interpreter", "imports", "run config")
PARTS = {
    "train": (
        *BEGINNING,
        "meeting",
        "loading the model",
        "data",
        "the rest of building",
        "largest micro-batch, tried",
        "first checkpoint, held",
        "first step",
    ),
    "evaluate": (
        *BEGINNING,
        "digest of the export",
        "data",
        "tokenizer",
        "loading the model",
        "adding the adapter",
        "ways of scoring compared",
        "first rows answered",
    ),
}


def one_start(job: jobs.PreparedJob, stage: str = "train") -> Figures:
    """Seconds of each part of one process, which ends after its first result, and its memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parts.json"
        environment = {**os.environ, **QUIET, **job.environment_of(Stage(stage)), STARTED_VARIABLE: str(time.time())}
        command = [sys.executable, "-m", "benchmarks.startup_worker", stage, str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if not out.exists():
            raise RuntimeError(f"it ended with {done.returncode}: {done.stderr[-2000:]}")
        found: Figures = json.loads(out.read_text())
    return found


def train(job: jobs.PreparedJob) -> None:
    """Train to the end, so that there is something to evaluate."""
    command = [sys.executable, "-m", "finetune_trainer", "train"]
    environment = {**os.environ, **QUIET, **job.environment_of()}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=600)


def imports_by_library(program: str = IMPORT_TRAIN, given: Mapping[str, str] = {}) -> dict[str, float]:
    """Seconds that each library's own modules take to import (`-X importtime`), largest first."""
    command = [sys.executable, "-X", "importtime", "-c", program]
    environment = {**os.environ, **QUIET, **given}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    totals: Counter[str] = Counter()
    for line in done.stderr.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and fields[0].strip().isdigit():
            totals[fields[2].strip().split(".")[0]] += int(fields[0])
    return {name: microseconds / 1e6 for name, microseconds in totals.most_common(12)}


def measure(workload: jobs.Workload, model: jobs.Model, folder: Path, starts: int) -> Figures:
    """Several starts of both stages of one job, each from nothing."""
    job = jobs.prepare(folder, model, workload, training={"maxSteps": 1}, split={"validation": 0.1, "test": 0})
    found: Figures = {"imports": imports_by_library(given=job.environment_of())}
    for stage in PARTS:
        one_start(job, stage)  # files into the page cache
        found[stage] = [one_start(job, stage) for _ in range(starts)]
        if stage == "train":
            train(job)
    return found


def run(size: Size) -> Result:
    """Starts of the tweets job."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        figures = measure(jobs.tweets(600), jobs.smollm2(), Path(folder), size.pick(1, 5))
    libraries = Table("Own import time by library (-X importtime, which slows it)", ("library", "seconds"))
    libraries.rows = [[name, f"{seconds:.2f}"] for name, seconds in figures["imports"].items()]
    tables = [_table("Train: process start to the end of the first step, seconds", figures["train"], PARTS["train"])]
    title = "Evaluate: process start to its first answers, seconds"
    tables.append(_table(title, figures["evaluate"], PARTS["evaluate"]))
    return Result("startup", figures, [*tables, libraries], ["One rank; files are in the page cache."])


def _table(title: str, starts: Sequence[Figures], parts: Sequence[str]) -> Table:
    totals = [sum(start["seconds"].values()) for start in starts]
    table = Table(title, ("", "median (least to most)", "share"))
    for part in parts:
        seconds = [start["seconds"][part] for start in starts]
        table.rows.append([part, spread(seconds, 2), f"{statistics.median(seconds) / statistics.median(totals):.0%}"])
    table.rows.append(["all", spread(totals, 2), ""])
    for name, key in (("MB after the imports", "importedMB"), ("MB at most", "peakMB")):
        table.rows.append([name, spread([start[key] for start in starts], 0), ""])
    return table
