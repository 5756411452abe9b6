"""The trainer's own loop as a measured process: what a Train pod runs, stopped after every step.

Nothing of it is changed: the loop reports each step to its monitor, and the monitor waits. With `--matmul` a plain
matrix product and the model's own products are timed after each step, with `--profile N` step N is profiled, with
`--validate-every N` the held-out documents are looked at; none of that is in a step's time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from finetune_trainer.__main__ import import_stage
from finetune_trainer.context import context_from_environment

if __name__ == "__main__":  # as `python -m finetune_trainer` does
    import_stage(context_from_environment(), "train")

import torch
from benchmarks.harness import matmul_flops, own_products_flops
from benchmarks.pace import Pace

from finetune_trainer.model.device import choose_device
from finetune_trainer.train import processes, stage
from finetune_trainer.train.interrupt import Interrupt
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.watchdog import Watchdog

KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn", "aten::linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "cross entropy": ("logsumexp", "argmax", "aten::exp_", "aten::gather", "aten::scatter_add"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat", "aten::index"),
    "norms and pointwise": ("aten::mul", "aten::add", "aten::silu", "aten::pow", "aten::mean", "aten::rsqrt",
                            "aten::neg", "aten::sum", "aten::div", "rms_norm", "aten::fill_", "aten::zero_"),
    "optimizer": ("_fused_adamw", "foreach_norm"),
    "communication": ("c10d::", "gloo:", "nccl:"),
}  # fmt: skip


COLLECTIVES = ("gloo:", "nccl:")


def build() -> Loop:
    """The loop as the Train stage builds it."""
    context = context_from_environment()
    device = choose_device(context.local_rank, context.gpus_per_node)
    group = processes.init_distributed(device, context.rank, context.world_size, 600)
    if context.rank == 0:
        context.take_fence()
    watchdog = Watchdog(context.logs, context.rank, context.world_size, 600, lambda sentence: None)
    return stage.build_loop(context, device, group, Interrupt(), watchdog)


def frozen_matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """The decoder's matrices that are not trained, in the order of the layers."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad and id(p) not in tables]


def kind_of(name: str) -> str:
    """Which kind of work an operation is."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile_by_kind(profiler: Any) -> dict[str, float]:
    """Own processor seconds of all operations, by kind."""
    totals: dict[str, float] = {}
    for event in profiler.key_averages():
        seconds = event.self_cpu_time_total / 1e6
        totals[kind_of(event.key)] = totals.get(kind_of(event.key), 0.0) + seconds
    return totals


def communication_share(profiler: Any) -> float:
    """Share of the profiled time in which a collective is under way on this rank."""
    spans = [(event.time_range.start, event.time_range.end, event.name) for event in profiler.events()]
    covered, until = 0.0, float("-inf")
    for start, end, name in sorted(spans):
        if name.startswith(COLLECTIVES):
            covered += max(0.0, end - max(start, until))
            until = max(until, end)
    return covered / (max(end for _, end, _ in spans) - min(start for start, _, _ in spans))


def run(matmul: bool = False, profiled: int = 0, validate_every: int = 0) -> None:
    """Train until nobody asks for another step."""
    loop, pace, computed = build(), Pace(), [0]
    loop.model.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].ids.numel()))
    precision = next((p.dtype for p in loop.model.parameters() if not p.requires_grad), torch.float32)
    record: Callable[..., None] = loop.monitor.step
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    done = 0

    def step(result: Any, learning_rate: float, epoch: float) -> None:
        nonlocal done
        record(result, learning_rate, epoch)
        pace.ended()
        done += 1
        figures: dict[str, Any] = {"tokens": result.tokens, "computedTokens": sum(computed), "loss": result.loss}
        documents = len(loop.sampler.step(result.step))
        figures |= {"precision": str(precision).removeprefix("torch."), "documents": documents}
        if done == profiled:
            profiler.stop()
            figures |= {"profile": profile_by_kind(profiler), "communicationShare": communication_share(profiler)}
        if matmul:
            figures["matmulFlops"] = matmul_flops(precision)
            figures["ownProductsFlops"] = own_products_flops(frozen_matrices(loop.model), sum(computed))
        if validate_every and done % validate_every == 0:
            assert loop.validator is not None
            figures["validationLoss"] = loop.validator(loop.model).loss
        computed.clear()
        pace.step(**figures)
        if done == profiled - 1:
            profiler.start()

    loop.monitor.step = step  # type: ignore[method-assign]
    loop.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matmul", action="store_true")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--validate-every", type=int, default=0)
    given = parser.parse_args()
    run(given.matmul, given.profile, given.validate_every)
