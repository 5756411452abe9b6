"""How near the trainer comes to what the machine can multiply: model FLOPs utilisation, and where the rest goes.

The FLOPs are those of `flops`. They are held against two rates, both measured after every step in the same process and
type: one large square product, the most that the machine does; and the products of the model's own matrices with as
many tokens as the step has, which no implementation of this model can leave out.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import flops, jobs
from benchmarks.harness import Figures, Result, Size, Table, spread
from benchmarks.workers import Worker, rounds, start_all

PROFILED_STEP = 3


def document_sums(job: jobs.PreparedJob) -> tuple[float, float, float]:
    """Mean tokens, squared tokens and labels of the documents."""
    from finetune_trainer.data.documents import DocumentStore

    store = DocumentStore(job.prepared / "train")
    lengths = store.lengths.astype(float)
    return float(lengths.mean()), float((lengths**2).mean()), float(store.target_counts.mean())


def measure(
    workload: jobs.Workload, model: jobs.Model, folder: Path, steps: int, rank: int = 16, precision: str = "auto"
) -> Figures:
    """Steps of the trainer, each followed by plain matrix products in the same process."""
    from finetune_trainer.data.manifest import PreparedManifest

    job = jobs.prepare(folder, model, workload, training={"precision": precision})
    counts = flops.flops_of(Path(PreparedManifest.read(job.prepared).model.directory), rank)
    tokens, squares, labelled = document_sums(job)
    with ExitStack() as stack:
        arguments = ["--matmul", "--profile", str(PROFILED_STEP)]
        worker = Worker("benchmarks.ours", arguments, environment=job.environment_of())
        start_all(stack, {"": worker})
        profiled = rounds({"": worker}, 1, warm_up=PROFILED_STEP - 2)[""][0]
        samples = rounds({"": worker}, steps, warm_up=0)[""]
    for sample in samples:
        share = sample["tokens"] / tokens  # a step's documents, counted as mean documents
        distinct = min(sample["tokens"], sample["computedTokens"])
        needed = counts.of_step(distinct, round(share * squares), round(share * labelled))
        sample["flopsPerSecond"] = needed / sample["seconds"]
        sample["utilisation"] = sample["flopsPerSecond"] / sample["matmulFlops"]
        sample["ofOwnProducts"] = sample["flopsPerSecond"] / sample["ownProductsFlops"]
    profile = profiled["profile"]
    return {
        "workload": workload.name,
        "meanTokens": tokens,
        "precision": samples[0]["precision"],
        "flopsAToken": counts.of_step(1000, round(squares / tokens * 1000), round(labelled / tokens * 1000)) / 1000,
        "samples": samples,
        "profileShares": {kind: seconds / sum(profile.values()) for kind, seconds in profile.items()},
    }


def run(size: Size) -> Result:
    """Utilisation on tweets and on chats of mixed length, with a profile of one step of each."""
    model = jobs.smollm2()
    figures: Figures = {}
    head = ("tokens/s", "GFLOP/s needed", "large product: GFLOP/s", "utilisation", "own products: GFLOP/s", "of these")
    table = Table("Against matrix products of the same type in the same process", ("", *head))
    found = [(jobs.tweets(600), "auto"), (jobs.chats(400), "auto"), (jobs.tweets(600), "fp32")][: size.pick(1, 3)]
    for workload, precision in found:
        with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
            one = measure(workload, model, Path(folder), size.pick(2, 6, 12), precision=precision)
        name = f"{workload.name}, {one['precision']}"
        figures[name] = one
        table.rows.append([name, *cells(one["samples"])])
    return Result("limit", figures, [table, profile_table(figures)], [flops.__doc__.replace("\n", " ").strip()])


def cells(samples: list[Figures]) -> list[str]:
    """Medians of the samples, as the table has them."""
    keys = ("flopsPerSecond", "matmulFlops", "utilisation", "ownProductsFlops", "ofOwnProducts")
    needed, limit, used, own, of_own = (statistics.median(sample[key] for sample in samples) for key in keys)
    speed = spread([sample["tokens"] / sample["seconds"] for sample in samples], 0)
    return [speed, f"{needed / 1e9:,.0f}", f"{limit / 1e9:,.0f}", f"{used:.0%}", f"{own / 1e9:,.0f}", f"{of_own:.0%}"]


def profile_table(figures: Figures) -> Table:
    """Where the processor time of one step went."""
    table = Table("Processor time of one step by kind of operation (torch.profiler)", ("", *figures))
    kinds = sorted(
        {kind for one in figures.values() for kind in one["profileShares"]},
        key=lambda kind: -max(one["profileShares"].get(kind, 0) for one in figures.values()),
    )
    for kind in kinds:
        table.rows.append([kind, *(f"{one['profileShares'].get(kind, 0):.0%}" for one in figures.values())])
    return table
