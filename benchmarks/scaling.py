"""One to three ranks on this machine, and on paper what 12 and 96 A100s send to each other.

Measured: the same documents per step on every number of ranks, one thread per rank. On paper, with P bytes of frozen
weights, A bytes of adapter gradients (float32), n ranks on N nodes of g GPUs, m micro-batches per step:
full sharding gathers all weights over all ranks for each forward and again for each backward pass, so that a rank
receives 2·m·P·(n-1)/n and a node's network carries as much in a ring; the adapters' gradients are reduced once per
step, A·(n-1)/n. Hybrid gathers within the node, 2·m·P·(g-1)/g over NVLink, and sends between nodes only the all-reduce
of gradients, 2·A·(N-1)/N per node. Frozen weights have no gradients to send. Full tuning also reduces the gradients of
all weights in float32 after every micro-batch.
"""

from __future__ import annotations

import socket
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, spread
from benchmarks.workers import Worker

PROFILED_STEP = 3
A100_FLOPS = 312e12
UTILISATION = 0.46
"""Share of the peak at which the paper's ranks compute while no one waits."""
NVLINK = 230e9
"""Bytes per second that a rank receives within a node: what NCCL reaches of A100's 300 GB/s per direction."""
NETWORKS = {"25 GB/s per node (one 200 Gb/s port)": 25e9, "200 GB/s per node (eight ports)": 200e9}
TOKENS_PER_RANK = 8192
"""Tokens of a rank's micro-batch, one per step."""


# --- measured --------------------------------------------------------------------------------------------------------


def measure(workload: jobs.Workload, model: jobs.Model, folder: Path, ranks: int, steps: int) -> list[Figures]:
    """Steps of `ranks` ranks, as rank 0 saw them; the first of them was profiled."""
    job = jobs.prepare(folder, model, workload)
    fields = job.environment_of()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        arguments = ["--profile", str(PROFILED_STEP)]
        workers = [
            stack.enter_context(
                Worker(
                    "benchmarks.ours", arguments, environment={**fields, **place, "RANK": str(r), "LOCAL_RANK": str(r)}
                )
            )
            for r in range(ranks)
        ]
        reports = [[worker.report() for worker in workers]]
        for _ in range(PROFILED_STEP - 1 + steps):
            for worker in workers:
                worker.go()
            reports.append([worker.report() for worker in workers])
    return [step[0] for step in reports[PROFILED_STEP - 1 :]]


# --- on paper --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """A number of nodes with equally many GPUs each."""

    nodes: int
    gpus: int

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step moves."""

    within: float
    """Received by a rank over NVLink."""
    between: float
    """Carried by a node's network, per direction."""

    def seconds(self, network: float) -> float:
        """Time that it takes if both go on at once: the slower of the two."""
        return max(self.within / NVLINK, self.between / network)


def traffic(cluster: Cluster, weights: float, gradients: float, hybrid: bool, *, full: bool = False) -> Traffic:
    """Bytes moved by a step of one micro-batch. `weights`: P; `gradients`: A; `full`: of all weights."""
    n, nodes, gpus = cluster.ranks, cluster.nodes, cluster.gpus
    if not hybrid:
        moved = (2 * weights + gradients) * (n - 1) / n
        return Traffic(within=moved, between=moved if nodes > 1 else 0.0)
    within = (2 * weights + gradients) * (gpus - 1) / gpus
    return Traffic(within=within, between=2 * gradients * (nodes - 1) / nodes)


def paper() -> Iterator[tuple[str, ...]]:
    """Rows of the table: Llama-3-8B on both clusters."""
    from finetune_api.spec import Tuning
    from finetune_operator.sizing.memory import Memory, Run
    from finetune_operator.sizing.model_shapes import known_model, shape_of

    facts = known_model("meta-llama/Meta-Llama-3-8B")
    assert facts is not None
    shape = shape_of(facts)
    for method, full in (("lora", False), ("qlora", False), ("full", True)):
        tuning = Tuning.model_validate({"method": method})
        memory = Memory(shape, Run(tuning=tuning))
        trained = memory.trained_parameters
        weights = 2.0 * shape.parameters if full else float(memory.weights)  # full tuning gathers float32 as bf16
        per_token = (6 if full else 4) * shape.active_parameters + (0 if full else 6 * trained)
        compute = TOKENS_PER_RANK * per_token / (UTILISATION * A100_FLOPS)
        for cluster in (Cluster(3, 4), Cluster(12, 8)):
            for hybrid in (False, True):
                moved = traffic(cluster, weights, 4.0 * trained, hybrid, full=full)
                cells = [f"{moved.within / 1e9:.1f}", f"{moved.between / 1e9:.2f}", f"{compute:.2f}"]
                for network in NETWORKS.values():
                    seconds = moved.seconds(network)
                    cells.append(f"{seconds:.2f} ({compute / max(compute, seconds):.0%})")
                layout = f"{cluster.ranks} = {cluster.nodes} x {cluster.gpus}"
                yield (method, layout, "hybrid" if hybrid else "full", *cells)


def run(size: Size) -> Result:
    """Ranks of this machine, then the paper."""
    model, figures = jobs.smollm2(), {}
    table = Table(
        "Ranks on this machine, one thread each, the same documents per step",
        ("ranks", "tokens/s", "against one rank", "share of the time in collectives", "peak MB per rank"),
    )
    alone = 0.0
    for ranks in range(1, size.pick(2, 3) + 1):
        with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
            samples = measure(jobs.tweets(600), model, Path(folder), ranks, size.pick(1, 5))
        figures[str(ranks)] = samples
        speeds = [sample["tokens"] / sample["seconds"] for sample in samples[1:]]
        alone = alone or statistics.median(speeds)
        share, peak = samples[0]["communicationShare"], max(sample["peakMegabytes"] for sample in samples)
        cells = [spread(speeds, 0), f"{statistics.median(speeds) / alone:.2f}", f"{share:.0%}", f"{peak:,.0f}"]
        table.rows.append([str(ranks), *cells])
    on_paper = Table(
        f"On paper: Llama-3-8B, {TOKENS_PER_RANK:,} tokens per rank and step, A100 at {UTILISATION:.0%} of 312 TFLOP/s",
        ("method", "GPUs", "sharding", "GB received per rank", "GB over a node's network", "s of computing",
         *(f"s of sending, {name} (computing if overlapped)" for name in NETWORKS)),
        [list(row) for row in paper()],
    )  # fmt: skip
    figures["paper"] = on_paper.rows
    notes = [
        "Three ranks share this machine's cores with each other where it has fewer than three.",
        f"Assumed: {NVLINK / 1e9:.0f} GB/s within a node, between nodes as the columns say; latency is not counted.",
    ]
    return Result("scaling", figures, [table, on_paper], notes)
