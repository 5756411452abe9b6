"""Time to a validation loss that both trainers reach, the looking not counted: speed that does not cost learning.

Same rows, adapter, constant learning rate, documents per step and held-out documents. The loss is fixed afterwards, as
the higher of the two best ones, so that neither side chose it. TRL runs at its fastest setting of the comparison.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import jobs, peers
from benchmarks.harness import Figures, Result, Size, Table
from benchmarks.workers import Worker, start_all

from finetune_trainer.data.documents import DocumentStore

VALIDATE_EVERY = 5
HELD_OUT = 60
"""Documents whose loss is measured: each measurement costs both sides a few steps' time, which is not counted."""
CONSTANT = {
    "scheduler": {"type": "constant", "warmupRatio": 0},
    "learningRate": 2e-4,
    "validateEvery": 1_000_000,
}
"""Of the spec; the loop itself does not validate."""


def curve(samples: Sequence[Figures]) -> list[tuple[float, float]]:
    """(seconds of training, loss) wherever the loss was looked at."""
    seconds, points = 0.0, []
    for sample in samples:
        seconds += sample["seconds"]
        if "validationLoss" in sample:
            points.append((seconds, sample["validationLoss"]))
    return points


def seconds_to(points: Sequence[tuple[float, float]], loss: float) -> float:
    """When the loss was first seen at or below this one."""
    return next(seconds for seconds, seen in points if seen <= loss)


def measure(
    workload: jobs.Workload,
    model: jobs.Model,
    folder: Path,
    steps: int,
    python: Path | None,
    setting: str = "TRL, padding-free",
) -> Figures:
    """Both curves; without TRL's Python ours alone. They take turns, so that the machine's load meets both."""
    held_out_share = HELD_OUT / len(workload.rows)
    job = jobs.prepare(folder, model, workload, split={"validation": held_out_share}, training=CONSTANT)
    rows, held_out = folder / "trl-rows.json", folder / "trl-validation.json"
    lengths = peers.rows_for_trl(peers.in_our_order(job, workload.examples_per_step, steps + 1), rows)
    peers.rows_for_trl(DocumentStore(job.prepared / "validation"), held_out)
    every = ["--validate-every", str(VALIDATE_EVERY)]
    with ExitStack() as stack:
        workers = {peers.OURS: Worker("benchmarks.ours", every, environment=job.environment_of())}
        samples = {name: [first] for name, first in start_all(stack, workers).items()}
        if python is not None:
            tokens = workload.examples_per_step * statistics.mean(lengths)
            settings = peers.settings_of_trl(
                workload.examples_per_step, tokens, max(lengths), samples[peers.OURS][0]["precision"]
            )
            further = {"validation": held_out, "validate_every": VALIDATE_EVERY}
            other = {setting: peers.trl_worker(python, job, rows, settings[setting], **further)}
            samples |= {name: [first] for name, first in start_all(stack, other).items()}
            workers |= other
        for _ in range(steps - 1):
            for name, worker in workers.items():
                samples[name].append(worker.step())
    return {"steps": steps, "samples": samples, "curves": {name: curve(taken) for name, taken in samples.items()}}


def run(size: Size) -> Result:
    """Tweets, up to 150 steps."""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        steps = size.pick(10, 60, 150)
        figures = measure(jobs.tweets(3000), jobs.smollm2(), Path(folder), steps, peers.environment_of_trl())
    curves = figures["curves"]
    loss = max(min(seen for _, seen in points) for points in curves.values())
    figures["loss"] = loss
    apart = statistics.median(
        abs(one["loss"] - other["loss"]) for one, other in zip(*figures["samples"].values(), strict=True)
    )
    table = Table(f"Seconds of training to a validation loss of {loss:.4f}", ("", "seconds", "best loss seen"))
    for name, points in curves.items():
        table.rows.append([name, f"{seconds_to(points, loss):.0f}", f"{min(seen for _, seen in points):.4f}"])
    alike = f"Step by step their training losses are {apart:.3f} apart (median of {steps})."
    return Result("convergence", figures, [table], [" ".join(__doc__.split("\n\n")[1].split()), alike])
