"""From the start of a Train process to its first step, by part; and which libraries the imports spend their time on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, spread
from benchmarks.workers import QUIET, ROOT

STARTED_VARIABLE = "BENCHMARK_STARTED"
PARTS = (
    "interpreter",
    "import torch",
    "import the trainer",
    "run config",
    "meeting",
    "loading the model",
    "data",
    "the rest of building",
    "largest micro-batch, tried",
    "first checkpoint, held",
    "first step",
)


def one_start(job: jobs.PreparedJob) -> Figures:
    """Seconds of each part of one process, which ends after its first step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parts.json"
        environment = {**os.environ, **QUIET, **job.environment_of(), STARTED_VARIABLE: str(time.time())}
        command = [sys.executable, "-m", "benchmarks.startup_worker", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if not out.exists():
            raise RuntimeError(f"it ended with {done.returncode}: {done.stderr[-2000:]}")
        found: Figures = json.loads(out.read_text())
    return found


def imports_by_library(module: str = "finetune_trainer.train.stage") -> dict[str, float]:
    """Seconds that each library's own modules take to import (`-X importtime`), largest first."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True, check=True)
    totals: Counter[str] = Counter()
    for line in done.stderr.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and fields[0].strip().isdigit():
            totals[fields[2].strip().split(".")[0]] += int(fields[0])
    return {name: microseconds / 1e6 for name, microseconds in totals.most_common(12)}


def measure(workload: jobs.Workload, model: jobs.Model, folder: Path, starts: int) -> Figures:
    """Several starts of one job, each from nothing."""
    job = jobs.prepare(folder, model, workload)
    one_start(job)  # files into the page cache
    return {"starts": [one_start(job) for _ in range(starts)], "imports": imports_by_library()}


def run(size: Size) -> Result:
    """Starts of the tweets job."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        figures = measure(jobs.tweets(600), jobs.smollm2(), Path(folder), size.pick(1, 5))
    totals = [sum(start.values()) for start in figures["starts"]]
    table = Table("Process start to the end of the first step, seconds", ("", "median (least to most)", "share"))
    for part in PARTS:
        seconds = [start[part] for start in figures["starts"]]
        share = statistics.median(seconds) / statistics.median(totals)
        table.rows.append([part, spread(seconds, 2), f"{share:.0%}"])
    table.rows.append(["all", spread(totals, 2), ""])
    libraries = Table("Own import time by library (-X importtime, which slows it)", ("library", "seconds"))
    libraries.rows = [[name, f"{seconds:.2f}"] for name, seconds in figures["imports"].items()]
    return Result("startup", figures, [table, libraries], ["One rank; files are in the page cache."])
