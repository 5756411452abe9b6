"""Side by side with TRL's SFTTrainer: same model, rows, adapter, precision, documents per step; steps in turn.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, ratios, spread
from benchmarks.workers import Worker, rounds, start_all

from finetune_trainer.context import context_from_environment
from finetune_trainer.data.documents import DocumentStore, StoredDocument
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.data.order import ExampleSampler
from finetune_trainer.model.device import choose_precision

TRL = "1.16.0"
OURS = "finetune-operator"
ROW_OF_TRL = 1024
"""Tokens of TRL's packed rows, and half of those of its batches at most."""
STEPS_OF_ROWS = 40
"""Steps' worth of rows handed to TRL: more than are measured."""
MEGABYTES_PER_WORKER = 4500
"""Memory that must be free for each process: what finds no room is left out, and the table says so."""


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


def settings_of_trl(examples: int, step_tokens: float, longest: int, precision: str) -> dict[str, dict[str, Any]]:
    """What is tried, by name. Each optimiser step has the documents (or, packed, the tokens) of one of ours."""
    row = max(ROW_OF_TRL, longest)
    # Longer rows cost TRL more: its mask is dense and quadratic in the row, and its memory grows with the batch.
    together = next(size for size in range(examples, 0, -1) if examples % size == 0 and size * longest <= 2 * row)
    whole = {"per_device_train_batch_size": together, "gradient_accumulation_steps": examples // together}
    whole |= {"bf16": precision == "bfloat16"}
    best = {**whole, "gradient_checkpointing": False, "model_dtype": precision}
    in_rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": max(1, round(step_tokens / row))}
    return {
        "TRL, padding-free": {**best, "padding_free": True, "max_length": None},
        "TRL, packed": {**best, **in_rows, "packing": True, "max_length": row},
        "TRL, padded": {**best, "max_length": None},
        "TRL, defaults": {**whole, "max_length": row},
    }


def rows_for_trl(documents: Iterable[StoredDocument], path: Path) -> list[int]:
    """Write documents as TRL takes them, ids and labels; returns their lengths."""
    rows = []
    for document in documents:
        labels = [-100] * len(document.ids)
        for position, target in zip(document.target_position.tolist(), document.target_id.tolist(), strict=True):
            assert document.ids[position + 1] == target
            labels[position + 1] = target
        rows.append({"input_ids": document.ids.tolist(), "labels": labels})
    path.write_text(json.dumps(rows))
    return [len(row["input_ids"]) for row in rows]


def in_our_order(job: jobs.PreparedJob, examples_per_step: int, steps: int = STEPS_OF_ROWS) -> Iterator[StoredDocument]:
    """The training documents of the first steps, as the trainer takes them."""
    spec = context_from_environment(job.environment_of()).config.spec
    store = DocumentStore(job.prepared / "train")
    order = ExampleSampler.of(store.dataset, [1.0], examples_per_step, spec.training.seed)
    return (store[int(example)] for step in range(steps) for example in order.step(step))


def trl_worker(
    python: Path, job: jobs.PreparedJob, rows: Path, settings: Mapping[str, Any], **further: object
) -> Worker:
    """TRL on the rows; `further` are more arguments of the process."""
    arguments: dict[str, object] = {
        "model": PreparedManifest.read(job.prepared).model.directory,
        "rows": rows,
        "tokenizer": job.prepared / "tokenizer",
        "settings": json.dumps(settings),
        "folder": rows.parent / "trl",
        **further,
    }
    flat = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    return Worker("benchmarks.trl_worker", flat, python=python)


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
) -> Figures:
    """Every sample of all contestants on one workload. `python` is TRL's environment's; None leaves TRL out."""
    job, rows, examples = jobs.prepare(folder, model, workload), folder / "trl-rows.json", workload.examples_per_step
    lengths = rows_for_trl(in_our_order(job, examples), rows)
    precision = str(choose_precision("auto", torch.device("cpu"))[0]).removeprefix("torch.")
    settings = settings_of_trl(examples, examples * statistics.mean(lengths), max(lengths), precision)
    chosen = [name for name in settings if python and (not only or name in only)]
    room = int(available_megabytes() // MEGABYTES_PER_WORKER) - 1
    chosen, left_out = chosen[:room], chosen[room:]
    with ExitStack() as stack:
        workers = {OURS: Worker("benchmarks.ours", [], environment=job.environment_of())}
        if python:
            workers |= {name: trl_worker(python, job, rows, settings[name]) for name in chosen}
        start_all(stack, workers)
        samples = rounds(workers, pairs)
    return {
        "workload": workload.name,
        "precision": precision,
        "examplesPerStep": examples,
        "meanTokens": statistics.mean(lengths),
        "longestTokens": max(lengths),
        "leftOutForLackOfMemory": left_out,
        "samples": samples,
    }


def rates(samples: Sequence[Figures], unit: str = "tokens", clock: str = "seconds") -> list[float]:
    """Units per second in each step."""
    return [sample[unit] / sample[clock] for sample in samples]


def summarise(found: Figures, unit: str = "tokens") -> Table:
    """One row for each contestant; ratios are of pairs of steps that followed each other."""
    samples, ours = found["samples"], rates(found["samples"][OURS], unit)
    title = (
        f"{found['workload']}: {found['examplesPerStep']} documents per step, {found['meanTokens']:.0f} tokens on "
        f"average, at most {found['longestTokens']}; {found['precision']}"
    )
    head = (f"{unit}/s: median (least to most)", "speed-up", "by CPU seconds", "padding", "peak MB")
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


def workload_of(name: str, size: Size) -> tuple[jobs.Workload, str, Sequence[str]]:
    """What is compared, in which unit, with which settings of TRL (none: all)."""
    if name == "intents":
        one_task = jobs.intents(1200, examples_per_step=size.pick(4, 8, 32))
        # Documents of one length: there is no padding to save, and in one row TRL's dense mask is larger.
        packed = size.pick((), (), ("TRL, padding-free",))
        return one_task, "documents", ("TRL, padded", *packed)
    return (jobs.tweets(600) if name == "tweets" else jobs.chats(400)), "tokens", ()


def run(size: Size, name: str) -> Result:
    """Compare on one workload: tweets, chats of mixed length, or intents, a task whose prompt names 77 labels."""
    python, model = environment_of_trl(), jobs.smollm2()
    workload, unit, only = workload_of(name, size)
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        found = compare(workload, model, Path(folder), size.pairs, only=only, python=python)
    best, factor = best_of(found, unit)
    notes = [f"{factor:.2f} times {best}, TRL's best here, in {unit}/s."]
    if found["leftOutForLackOfMemory"]:
        notes.append(f"Left out for lack of memory: {', '.join(found['leftOutForLackOfMemory'])}.")
    figures = {"trl": TRL, **found, "best": best, "factor": factor}
    return Result(f"peers-{name}", figures, [summarise(found, unit)], [*notes, *FAIRNESS])


FAIRNESS = [
    "Tokens are those of the documents: padding is not counted, a prefix that is computed once counts every time.",
    "Warm-up (two steps of each) is not counted; who begins changes from round to round; all processes have all cores.",
    "TRL at its defaults recomputes activations and holds weights in float32; its other settings do neither.",
    "Peak MB is the largest resident memory of the process, import of its libraries and loading included.",
]

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(environment_of_trl())
