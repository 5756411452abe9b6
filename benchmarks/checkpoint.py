"""How long a checkpoint holds the loop, against a save that the loop waits for, and what it costs a run in all."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, in_turn, spread, timed
from benchmarks.workers import Worker, rounds, start_all
from torch import Tensor

from finetune_trainer.train import processes
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.state import TrainState

AIM = 0.02
EVERY_SECONDS = 600
"""checkpoint.everyMinutes by default."""
SIZES = {"LoRA, rank 16, of 135M": 4_884_480, "full tuning of 135M": 134_515_008}
"""Trained parameters of which a checkpoint holds three times as many float32 values."""


def state_of(parameters: int, tensors: int = 60) -> dict[str, Tensor]:
    """Parameters and two moments in float32, split into `tensors` tensors each."""
    each = max(1, parameters // tensors)
    return {f"{kind}.{i}": torch.randn(each) for kind in ("model", "exp_avg", "exp_avg_sq") for i in range(tensors)}


def saves(parameters: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way to save, in turn."""
    tensors, steps = state_of(parameters), count(1)
    group = processes.init_distributed(torch.device("cpu"), 0, 1, 600)
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
            directory = Path(folder) / "checkpoints"
            directory.mkdir()
            checkpoints = Checkpoints(
                directory, group, keep=1, attempt="benchmark", identity={}, check_fence=lambda: None
            )

            held: list[float] = []

            def published() -> float:
                begun = time.perf_counter()
                held.append(timed(lambda: checkpoints.save(tensors, TrainState(step=next(steps)))))
                checkpoints.wait()
                return time.perf_counter() - begun

            def synchronous() -> float:
                target = Path(folder) / "synchronous"
                shutil.rmtree(target, ignore_errors=True)
                writer = dcp.FileSystemWriter(target, sync_files=True)
                return timed(lambda: dcp.save(dict(tensors), storage_writer=writer, process_group=group))

            ways: dict[str, Callable[[], float]] = {
                "until it is published": published,
                "torch's save, waited for": synchronous,
            }
            in_turn(ways, 1)
            held.clear()  # of the warm-up
            found = in_turn(ways, repetitions)
            return {"the loop is held": held, **found}
    finally:
        dist.destroy_process_group()


def steps_with_saves(workload: jobs.Workload, model: jobs.Model, folder: Path, pairs: int) -> Figures:
    """Steps of a loop that saves after every one of them, and of one that never does, in turn."""
    never = jobs.prepare(folder / "never", model, workload)
    always = jobs.prepare(folder / "always", model, workload, checkpoint={"everyMinutes": 0.0001})
    with ExitStack() as stack:
        both = {
            name: Worker("benchmarks.ours", [], environment=job.environment_of())
            for name, job in {"never": never, "after every step": always}.items()
        }
        start_all(stack, both)
        return rounds(both, pairs)


def run(size: Size) -> Result:
    """Both: saves alone, and a loop that saves all the time."""
    figures: Figures = {}
    table = Table(
        "Seconds of a checkpoint",
        ("", "MB", "the loop is held", "until published", "torch's save, waited for", "held / waited for"),
    )
    for name, parameters in list(SIZES.items())[: size.pick(1, 2)]:
        found = saves(parameters, size.pick(2, 5))
        figures[name] = found
        held, published, waited = found.values()
        share = statistics.median(held) / statistics.median(waited)
        cells = [spread(values, 3) for values in (held, published, waited)]
        table.rows.append([name, f"{parameters * 12 / 1e6:,.0f}", *cells, f"{share:.2f}"])
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        steps = steps_with_saves(jobs.tweets(600), jobs.smollm2(), Path(folder), size.pairs)
    figures["steps"] = steps
    never, always = ([sample["seconds"] for sample in steps[name]] for name in ("never", "after every step"))
    cost = statistics.median(a - n for a, n in zip(always, never, strict=True))
    figures["costSeconds"], figures["shareOfRun"] = cost, cost / EVERY_SECONDS
    loops = Table("Seconds per loop step (LoRA)", ("never saves", "saves after every step", "cost of a save"))
    loops.rows.append([spread(never, 2), spread(always, 2), f"{cost:.2f}"])
    note = (
        f"A save every ten minutes costs {max(0.0, figures['shareOfRun']):.2%} of a run (aim {AIM:.0%}), "
        "its thread's work included."
    )
    return Result("checkpoint", figures, [table, loops], [note])
