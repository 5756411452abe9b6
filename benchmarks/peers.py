"""Side by side with TRL's SFTTrainer: same model, rows, adapter, precision and documents a step, step by step in turn.

TRL is given the finished token ids and labels, so neither side tokenises. It is measured at its defaults and at every
setting that could be its best on a CPU; all of them are shown, and the aim is held against the best.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, ratios, spread
from benchmarks.workers import Worker, rounds, start_all

TRL = "1.16.0"
OURS = "finetune-operator"
STEPS_OF_ROWS = 40
"""Steps' worth of rows handed to TRL: more than are measured."""
PACKED_TOKENS = 1024
MEGABYTES_A_WORKER = 3500
"""Memory that must be free before one more process is started."""


def environment_of_trl() -> Path:
    """Python of an environment with TRL, made once: TRL alone is installed, the rest is this environment's own.

    So both sides compute with the same torch, transformers and peft.
    """
    base = Path(sysconfig.get_paths()["purelib"])
    key = hashlib.sha256(str(base).encode()).hexdigest()[:8]
    folder = jobs.assets().cache_directory() / "benchmarks" / f"trl-{TRL}-{key}"
    python = folder / "bin" / "python"
    if (folder / ".ready").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "benchmark.pth").write_text(f"{base}\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), f"trl=={TRL}"]
    subprocess.run(pip, check=True)
    (folder / ".ready").touch()
    return python


def settings_of_trl(examples: int, precision: str, longest: int) -> dict[str, dict[str, Any]]:
    """What is tried, by name. Each optimiser step has the documents (or, packed, the tokens) of one of ours."""
    whole = {"per_device_train_batch_size": examples, "bf16": precision == "bfloat16"}
    best = {**whole, "gradient_checkpointing": False, "model_dtype": precision}
    return {
        "TRL, defaults": {**whole, "max_length": max(1024, longest)},
        "TRL, padded": {**best, "max_length": None},
        "TRL, padding-free": {**best, "padding_free": True, "max_length": None},
        "TRL, packed": {**best, "packing": True, "max_length": max(PACKED_TOKENS, longest)},
    }


def rows_for_trl(job: jobs.PreparedJob, examples_a_step: int, path: Path) -> list[int]:
    """Write the documents of the first steps in our order as TRL takes them; returns their lengths."""
    from finetune_trainer.context import context_from_environment
    from finetune_trainer.data.documents import DocumentStore
    from finetune_trainer.data.order import Order

    spec = context_from_environment(job.environment_of()).config.spec
    store = DocumentStore(job.prepared / "train")
    order = Order.of(store.dataset, [1.0], examples_a_step, spec.training.seed)
    rows = []
    for example in chain.from_iterable(order.step(step).tolist() for step in range(STEPS_OF_ROWS)):
        document = store[example]
        labels = [-100] * len(document.ids)
        for position, target in zip(document.target_position.tolist(), document.target_id.tolist(), strict=True):
            assert document.ids[position + 1] == target
            labels[position + 1] = target
        rows.append({"input_ids": document.ids.tolist(), "labels": labels})
    path.write_text(json.dumps(rows))
    return [len(row["input_ids"]) for row in rows]


def available_megabytes() -> float:
    """Memory that processes could still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e6


def compare(
    workload: jobs.Workload,
    model: jobs.Model,
    folder: Path,
    pairs: int,
    *,
    only: Sequence[str] = (),
    python: Path | None = None,
    environment: Mapping[str, str] = {},
) -> Figures:
    """Every sample of all contestants on one workload. `python` is TRL's environment's; None leaves TRL out."""
    job = jobs.prepare(folder, model, workload)
    rows = folder / "trl-rows.json"
    lengths = rows_for_trl(job, workload.examples_a_step, rows)
    left_out: list[str] = []
    with ExitStack() as stack:
        ours = Worker("benchmarks.ours", [], environment={**environment, **job.environment_of()})
        first = start_all(stack, {OURS: ours})[OURS]
        workers = {OURS: ours}
        from finetune_trainer.data.manifest import PreparedManifest

        directory = PreparedManifest.read(job.prepared).model.directory
        settings = settings_of_trl(workload.examples_a_step, first["precision"], max(lengths))
        for name, chosen in settings.items() if python else ():
            if only and name not in only:
                continue
            if available_megabytes() < MEGABYTES_A_WORKER:
                left_out.append(name)
                continue
            packed = chosen.get("packing")
            if packed:
                step_tokens = workload.examples_a_step * statistics.mean(lengths)
                rows_a_step = max(1, round(step_tokens / chosen["max_length"]))
                chosen = {**chosen, "per_device_train_batch_size": 1, "gradient_accumulation_steps": rows_a_step}
            arguments = {
                "model": directory,
                "rows": str(rows),
                "tokenizer": str(job.prepared / "tokenizer"),
                "settings": json.dumps(chosen),
                "folder": str(folder / "trl"),
            }
            flat = [f"--{key}={value}" for key, value in arguments.items()]
            worker = Worker("benchmarks.trl_worker", flat, python=python, environment=environment)
            start_all(stack, {name: worker})
            workers[name] = worker
        samples = rounds(workers, pairs)
    return {
        "workload": workload.name,
        "precision": first["precision"],
        "examplesAStep": workload.examples_a_step,
        "meanTokens": statistics.mean(lengths),
        "longestTokens": max(lengths),
        "leftOutForLackOfMemory": left_out,
        "samples": samples,
    }


def rates(samples: Sequence[Figures], unit: str = "tokens", clock: str = "seconds") -> list[float]:
    """Units a second of each step."""
    return [sample[unit] / sample[clock] for sample in samples]


def summarise(found: Figures, unit: str = "tokens") -> Table:
    """One row for each contestant; ratios are of pairs of steps that followed each other."""
    samples, ours = found["samples"], rates(found["samples"][OURS], unit)
    title = (
        f"{found['workload']}: {found['examplesAStep']} documents a step, {found['meanTokens']:.0f} tokens on average, "
        f"at most {found['longestTokens']}; {found['precision']}"
    )
    head = (f"{unit}/s: median (least to most)", "ours is so many times faster", "by CPU seconds", "padding", "peak MB")
    table = Table(title, ("", *head, "ours / its peak"))
    own_peak = max(sample["peakMegabytes"] for sample in samples[OURS])
    own_cpu = rates(samples[OURS], unit, "cpuSeconds")
    for name, taken in samples.items():
        speed, peak = rates(taken, unit), max(sample["peakMegabytes"] for sample in taken)
        computed, tokens = (sum(sample[key] for sample in taken) for key in ("computedTokens", "tokens"))
        padding = f"{1 - tokens / computed:.0%}" if tokens <= computed else f"{tokens / computed:.1f} times shared"
        by_cpu = statistics.median(ratios(own_cpu, rates(taken, unit, "cpuSeconds")))
        row = [name, spread(speed), spread(ratios(ours, speed), 2), f"{by_cpu:.2f}", padding, f"{peak:,.0f}"]
        table.rows.append([*row, f"{own_peak / peak:.2f}"])
    return table


def best_of(found: Figures, unit: str = "tokens") -> tuple[str, float]:
    """TRL's fastest setting by median, and how many times faster ours is."""
    samples = found["samples"]
    others = [name for name in samples if name != OURS]
    name = max(others, key=lambda other: statistics.median(rates(samples[other], unit)))
    return name, statistics.median(ratios(rates(samples[OURS], unit), rates(samples[name], unit)))


def workloads(size: Size) -> list[tuple[jobs.Workload, str, Sequence[str]]]:
    """What is compared, in which unit, with which settings of TRL (none: all)."""
    tweets, chats = jobs.tweets(600), jobs.chats(400)
    found: list[tuple[jobs.Workload, str, Sequence[str]]] = [(tweets, "tokens", ()), (chats, "tokens", ())]
    if size.name == "quick":
        return found[:1]
    one_task = jobs.intents(1200, examples_a_step=size.pick(8, 12, 32))
    return [*found, (one_task, "documents", ("TRL, padded", "TRL, padding-free"))]


def run(size: Size) -> Result:
    """Compare on tweets, on chats of mixed length and on a task whose prompt names 77 labels."""
    python, model = environment_of_trl(), jobs.smollm2()
    figures: Figures = {"trl": TRL}
    tables, notes = [], []
    for workload, unit, only in workloads(size):
        with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
            found = compare(workload, model, Path(folder), size.pairs, only=only, python=python)
        name, factor = best_of(found, unit)
        figures[workload.name] = found | {"best": name, "factor": factor}
        tables.append(summarise(found, unit))
        notes.append(f"{workload.name}: {factor:.2f} times {name}, its best here, in {unit}/s.")
        if found["leftOutForLackOfMemory"]:
            notes.append(f"Left out for lack of memory: {', '.join(found['leftOutForLackOfMemory'])}.")
    notes += FAIRNESS
    return Result("peers", figures, tables, notes)


FAIRNESS = [
    "Tokens are those of the documents: padding is not counted, a prefix that is computed once counts every time.",
    "Warm-up (two steps of each) is not counted; who begins changes from round to round; all processes have all cores.",
    "TRL at its defaults recomputes activations and holds weights in float32; its other settings do neither.",
    "Peak MB is the largest resident memory of the process, import of its libraries and loading included.",
]

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(environment_of_trl())
