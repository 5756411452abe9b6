"""A plan as a page: whether the job fits, how long it takes, what it costs, and warnings."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from finetune_api.cel import own_violations
from finetune_api.report import Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.sizing.plan import gib
from finetune_operator.view.words import count, duration

BAR_CELLS = 24


def render_plan(
    name: str, spec: FineTuneJobSpec, plan: Plan, origins: Sequence[str], price_per_gpu_hour: float | None
) -> list[RenderableType]:
    """The parts of the page, in order."""
    model = (spec.model.repo or spec.model.path or "").rpartition("/")[2]
    title = Text.assemble((name, "bold"), f"  {model} · {spec.tuning.method} · {_where(spec, plan)}")
    parts: list[RenderableType] = [title, "", _memory(spec, plan), "", _figures(spec, plan, price_per_gpu_hour)]
    if plan.warnings:
        parts += ["", _list(plan.warnings, Text("!", style="bold yellow"))]
    return [*parts, "", _list(origins, Text("·"), style="dim")]


def _list(sentences: Sequence[str], mark: Text, style: str = "") -> Table:
    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row(mark, Text(sentence, style=style))
    return table


def _where(spec: FineTuneJobSpec, plan: Plan) -> str:
    """`3 nodes × 4 A100-80GB`, `2 processes on the CPU`."""
    topology = spec.topology
    if topology.gpus_per_node == 0:
        return f"{plan.world_size} {_plural('process', plan.world_size)} on the CPU"
    kind = plan.device or topology.gpu_type or "GPU"
    each = plan.world_size // topology.nodes
    nodes = f"{topology.nodes} nodes × " if topology.nodes > 1 else ""
    return f"{nodes}{each} {kind if plan.device or topology.gpu_type else _plural('GPU', each)}"


def _plural(word: str, number: int) -> str:
    if number == 1:
        return word
    return f"{word}es" if word.endswith("s") else f"{word}s"


def _memory(spec: FineTuneJobSpec, plan: Plan) -> Table:
    holder = "process" if spec.topology.gpus_per_node == 0 else "GPU"
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row(Text(f"Peak memory per {holder}", style="bold"), "", "")
    whole = plan.device_bytes or plan.memory_bytes
    for component in plan.memory:
        cells = component.bytes / max(1, whole) * BAR_CELLS
        bar = "█" * int(cells) + ("▌" if cells - int(cells) >= 0.5 else "")
        table.add_row(f"  {component.name}", gib(component.bytes), Text(bar, style="cyan"))
    table.add_row(Text("  total", style="bold"), Text(gib(plan.memory_bytes), style="bold"), _verdict(plan))
    return table


def _verdict(plan: Plan) -> Text:
    if plan.device_bytes is None:
        return Text("")
    share = plan.memory_bytes / plan.device_bytes
    of = f"{share:.0%} of {gib(plan.device_bytes)}: "
    return Text.assemble(of, ("it fits", "bold green") if plan.fits else ("it does not fit", "bold red"))


def _figures(spec: FineTuneJobSpec, plan: Plan, price_per_gpu_hour: float | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, text in _rows(spec, plan, price_per_gpu_hour):
        table.add_row(name, text)
    return table


def _rows(spec: FineTuneJobSpec, plan: Plan, price_per_gpu_hour: float | None) -> list[tuple[str, str]]:
    training = spec.training
    holder = "process" if spec.topology.gpus_per_node == 0 else "GPU"
    share = plan.trainable_parameters / max(1, plan.parameters)
    batch = f"global batch size {training.global_batch_size}"
    rows = [
        ("Trained", f"{count(plan.trainable_parameters)} of {count(plan.parameters)} parameters ({_percent(share)})"),
        ("Steps", f"{plan.steps:,}: {_epochs(spec)} of {plan.examples:,} examples, {batch}"),
        ("Tokens", f"{count(plan.tokens)} total, {plan.tokens_per_rank_step:,} per {holder} and step"),
        ("Micro-batch", _micro_batch(plan, holder)),
        ("Host memory", f"{gib(plan.host_bytes)} per node"),
        ("Compute", f"{plan.flops:.2g} FLOPs ({_formula(spec, plan)})"),
    ]
    if plan.hours is not None and plan.utilisation is not None:
        gpus = f"{plan.world_size} {plan.device}"
        about = f"about {duration(plan.hours * 3600)} on {gpus}, assuming {plan.utilisation:.0%} of peak throughput"
        shared = _may_share_prefixes(spec)
        rows.append(("Time", f"{about}; less if examples share a prompt prefix" if shared else about))
        hours = plan.hours * plan.world_size
        cost = f"; {plan.price:,.2f} at {price_per_gpu_hour:g} per GPU-hour" if plan.price is not None else ""
        rows.append(("Price", f"{hours:,.2f} GPU-hours{cost or ' (--price NUMBER shows the cost)'}"))
    return rows


def _may_share_prefixes(spec: FineTuneJobSpec) -> bool:
    """Whether the spec allows `sharedPrefixes: true` and does not set it to false."""
    if spec.training.shared_prefixes is False:
        return False
    asking = spec.model_copy(update={"training": spec.training.model_copy(update={"shared_prefixes": True})})
    return all(violation.path != ("training", "sharedPrefixes") for violation in own_violations(asking))


def _epochs(spec: FineTuneJobSpec) -> str:
    if spec.training.max_steps is not None:
        return "set by maxSteps, epochs"
    epochs = spec.training.epochs
    return f"{epochs:g} {_plural('epoch', 1 if epochs == 1 else 2)}"


def _micro_batch(plan: Plan, holder: str) -> str:
    checkpointing = "activation checkpointing" if plan.activation_checkpointing else "no activation checkpointing"
    number = f"{plan.micro_batches} per {holder} and step"
    return f"up to {plan.micro_batch_tokens:,} tokens, {number}; {checkpointing}"


def _formula(spec: FineTuneJobSpec, plan: Plan) -> str:
    formula = "6N per token" if spec.tuning.method.traits.trains_base else "4N per token plus the adapters"
    if plan.activation_checkpointing:
        formula += ", 2N for recomputation"
    return f"{formula}, plus attention; N: matrix elements"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"
