"""Prepare on many rows: rows per second, and whether its memory grows with the dataset."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, slope
from benchmarks.workers import QUIET

from finetune_api.base import Stage
from finetune_trainer.prepare.workers import PARALLEL_ROWS


def tweet_pairs(count: int) -> Iterator[dict[str, str]]:
    """So many different texts, each of two tweets: no two are nearly the same."""
    rows = [(row["text"][:200], row["label"]) for row in jobs.tweet_rows()]
    for number in range(count):
        (first, label), (second, _) = (
            rows[number % len(rows)],
            rows[(number * 31 + number // len(rows) + 1) % len(rows)],
        )
        yield {"text": f"{first} {second}", "label": label}


def prepare_rows(model: jobs.Model, folder: Path, rows: list[dict[str, str]]) -> Figures:
    """One Prepare process over the rows: seconds, processor seconds, tokens, memory of it and of its workers."""
    columns = {"task": "classification", "columns": {"text": "text", "label": "label"}}
    workload = jobs.Workload("pairs", rows, columns, 8)
    job = jobs.configure(folder, model, workload, split={"validation": 0.01})
    environment = {**os.environ, **QUIET, **job.environment_of(Stage.PREPARE)}
    begun, used = time.perf_counter(), processor_seconds()
    process = subprocess.Popen([sys.executable, "-m", "finetune_trainer", "prepare"], env=environment, stderr=-3)
    own = everybody = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            resident = [member.memory_info().rss for member in (watched, *watched.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue
        own, everybody = max(own, resident[0]), max(everybody, sum(resident))
        time.sleep(0.1)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(f"prepare ended with {process.returncode}: see {job.run}/logs")
    from finetune_trainer.data.manifest import PreparedManifest

    manifest = PreparedManifest.read(job.prepared)
    tokens = manifest.train.tokens + manifest.validation.tokens
    return {
        "rows": len(rows),
        "seconds": seconds,
        "processorSeconds": processor_seconds() - used,
        "tokens": tokens,
        "ownPeakMegabytes": own / 1e6,
        "peakMegabytes": everybody / 1e6,
    }


def processor_seconds() -> float:
    """Of all processes that were started here, and by these, and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(model: jobs.Model, counts: list[int]) -> Figures:
    """A process for each number of rows."""
    points = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
            points.append(prepare_rows(model, Path(folder), list(tweet_pairs(count))))
    grows = slope((point["rows"] / 1e5, point["ownPeakMegabytes"]) for point in points) if len(points) > 1 else 0.0
    return {"points": points, "megabytesPer100000Rows": grows}


def run(size: Size) -> Result:
    """Up to 200,000 rows; 5 million in full."""
    counts = size.pick([1_000, 4_000], [50_000, 100_000, 200_000], [200_000, 1_000_000, 5_000_000])
    figures = measure(jobs.smollm2(), counts)
    points = figures["points"]
    more = {key: points[-1][key] - points[-2][key] for key in ("rows", "seconds", "processorSeconds")}
    rate = more["rows"] / more["seconds"] if more["seconds"] > 0 else float("nan")
    figures["rowsPerSecond"] = rate
    figures["processorMicrosecondsPerRow"] = 1e6 * more["processorSeconds"] / more["rows"]
    table = Table(
        "Prepare: rows divided, rendered, tokenised and written",
        ("rows", "seconds", "processor seconds", "rows/s", "tokens/s", "peak MB of the process", "with its workers"),
    )
    for point in points:
        per_second = (f"{point[key] / point['seconds']:,.0f}" for key in ("rows", "tokens"))
        memory = (f"{point[key]:,.0f}" for key in ("ownPeakMegabytes", "peakMegabytes"))
        seconds = (f"{point[key]:.1f}" for key in ("seconds", "processorSeconds"))
        table.rows.append([f"{point['rows']:,}", *seconds, *per_second, *memory])
    note = (
        f"{rate:,.0f} rows/s beyond the start-up, a row takes {figures['processorMicrosecondsPerRow']:.0f} µs of a "
        f"processor; the process's memory grows by {figures['megabytesPer100000Rows']:.0f} MB for 100,000 rows."
    )
    return Result("prepare", figures, [table], [note, f"Worker processes are started from {PARALLEL_ROWS:,} rows on."])
