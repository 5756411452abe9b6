"""The plan of a run before a GPU is taken: rows, memory, steps, time, price, and what will go wrong.

Pure: from the spec, the model's shape and the documents' lengths to a Plan. What it advises it has tried: each way
to make a run fit is a plan of its own that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor
from typing import Literal

from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import nearest
from finetune_operator.sizing.gpus import GIB, GPUS, Gpu, find_gpu
from finetune_operator.sizing.memory import Memory, Run
from finetune_operator.sizing.model_shapes import Shape, shape_of

UTILISATION, UTILISATION_4_BIT = 0.40, 0.30
"""Share of the peak speed that is assumed. Published: Llama-3-8B, LoRA, one H100, bf16: 402 of 989 TFLOP/s;
4-bit weights are dequantised for every product."""
ROW_STEP = 256
"""Rows are planned in multiples of so many tokens."""
EFFICIENT_ROW = 2048
"""A GPU computes shorter rows no faster: activations are recomputed rather than have shorter ones."""
ROW_BUDGET = 0.88
"""Share of the GPU's memory that rows may be planned into: activations are known to some 15% only."""
LARGEST_ROW = 65_536
"""Longer rows bring nothing more."""
CPU_ROW = 768
"""Tokens of a row on a CPU, where longer rows are no faster and take more memory."""
UNKNOWN_GPU_ROW = 8192
"""Tokens of a row while the GPU is not known; an out-of-memory halves it."""
FEW_STEPS = 50
STARVING_TOKENS = 1024
"""Tokens a GPU and step below which it waits for weights more than it computes."""
PARAMETERS_PER_TOKEN = 10
"""Trained parameters a training token above which most of them have nothing to learn from."""


@dataclass(frozen=True)
class Planner:
    """Everything that a plan follows from."""

    spec: FineTuneJobSpec
    shape: Shape
    lengths: LengthFacts
    gpu: Gpu | None
    price_per_gpu_hour: float | None
    cpu_bf16: bool = False
    """Whether the CPU has instructions for bf16."""

    # --- where it runs ---

    @property
    def cuda(self) -> bool:
        """Whether GPUs compute."""
        return self.spec.topology.gpus_per_node != 0

    @property
    def ranks_per_node(self) -> int:
        """Processes of a pod."""
        return max(1, 1 if self.spec.topology.gpus_per_node is None else self.spec.topology.gpus_per_node)

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.spec.topology.nodes * self.ranks_per_node

    @property
    def _compute_bytes(self) -> Literal[2, 4]:
        asked = self.spec.training.precision
        if asked == "auto":
            fast = self.gpu is None or self.gpu.bf16 if self.cuda else self.cpu_bf16
            return 2 if fast else 4
        return 2 if asked == "bf16" else 4

    # --- how much there is to do ---

    @cached_property
    def steps(self) -> int:
        """Optimiser steps in all: each epoch begins with a new step."""
        training, documents = self.spec.training, self.lengths.documents
        if training.max_steps is not None:
            return training.max_steps
        batch, whole = training.global_batch_size, floor(training.epochs)
        part = round((training.epochs - whole) * documents)
        return max(1, whole * ceil(documents / batch) + ceil(part / batch))

    @cached_property
    def _examples_per_step(self) -> float:
        batch, documents = self.spec.training.global_batch_size, self.lengths.documents
        return documents / max(1, ceil(documents / batch))

    @cached_property
    def _tokens_per_document(self) -> float:
        return self.lengths.tokens / max(1, self.lengths.documents)

    @cached_property
    def tokens(self) -> int:
        """Tokens in all."""
        return round(self.steps * self._examples_per_step * self._tokens_per_document)

    @cached_property
    def tokens_per_rank_step(self) -> int:
        """Mean tokens of a rank in a step."""
        return ceil(self._examples_per_step * self._tokens_per_document / self.ranks)

    # --- rows and memory ---

    @cached_property
    def shortest_row(self) -> int:
        """No row can be shorter than the longest document."""
        return max(1, self.lengths.longest + self.spec.tuning.virtual_tokens)

    def memory(self, row: int, checkpointing: bool) -> Memory:
        """Peak memory of a rank whose rows have so many tokens."""
        spec, topology = self.spec, self.spec.topology
        hybrid = topology.sharding == "hybrid" and topology.nodes > 1
        run = Run(
            tuning=spec.tuning,
            compute_bytes=self._compute_bytes,
            cuda=self.cuda,
            ranks=self.ranks,
            shard_ranks=self.ranks_per_node if hybrid else self.ranks,
            checkpointing=checkpointing,
            compiled=self.cuda if spec.training.compile is None else spec.training.compile,
            accumulates=self.rows_per_step(row) > 1,
            labelled_share=min(1.0, self.lengths.labelled / max(1, self.lengths.tokens)),
            longest=self.lengths.longest,
        )
        return Memory(self.shape, run)

    def rows_per_step(self, row: int) -> int:
        """Rows that a rank computes in a step, if its share of the tokens fills them."""
        return max(1, ceil(self.tokens_per_rank_step / row))

    def _fits(self, row: int, checkpointing: bool) -> bool:
        """Whether a row of so many tokens leaves some of the GPU's memory free."""
        assert self.gpu is not None
        return self.memory(row, checkpointing).total(row) <= ROW_BUDGET * self.gpu.memory_bytes

    @cached_property
    def layout(self) -> tuple[int, bool]:
        """Tokens of a row and whether activations are recomputed.

        As much of a rank's step in one row as fits. Recomputed only if asked for, or if neither the longest document
        nor a row that a GPU computes well would fit otherwise.
        """
        asked = self.spec.training.activation_checkpointing
        if not self.cuda:
            return max(self.shortest_row, CPU_ROW), bool(asked)
        if self.gpu is None:
            return max(self.shortest_row, min(self._wanted_row, UNKNOWN_GPU_ROW)), bool(asked)
        least = max(self.shortest_row, min(EFFICIENT_ROW, self._wanted_row))
        can_recompute = self.spec.tuning.method.traits.can_recompute
        checkpointing = can_recompute and not self._fits(least, False) if asked is None else asked
        return self._longest_fitting(checkpointing), checkpointing

    @cached_property
    def _wanted_row(self) -> int:
        """All that a rank has to do in a step, and a little, since rows are not filled to the last token."""
        wanted = ceil(1.1 * self.tokens_per_rank_step / ROW_STEP) * ROW_STEP
        return max(self.shortest_row, min(wanted, LARGEST_ROW))

    def _longest_fitting(self, checkpointing: bool) -> int:
        low, high = 0, ceil((self._wanted_row - self.shortest_row) / ROW_STEP)
        while low < high:  # rows of shortest_row + n * ROW_STEP: the largest n that fits
            middle = (low + high + 1) // 2
            if self._fits(self.shortest_row + middle * ROW_STEP, checkpointing):
                low = middle
            else:
                high = middle - 1
        return self.shortest_row + low * ROW_STEP

    # --- time ---

    @cached_property
    def flops(self) -> float:
        """Operations of the training.

        With N matrix elements that a token goes through: forward 2N, gradients of activations 2N through the layers
        above the lowest that is trained, gradients of weights 2N of those that are trained: 6N for full tuning, 4N
        and the adapters for LoRA. Recomputation adds 2N. Attention adds 2 * length * width a layer and pass (half of
        it is masked). The head is computed at labelled positions only.
        """
        memory = self.memory(*self.layout)
        facts = self.shape.facts
        layers = facts.num_hidden_layers
        backward = len(memory.layers_with_backward) / max(1, layers)
        passes = 1 + backward + (backward if self.layout[1] else 0)
        active = self.shape.active_parameters
        full = self.spec.tuning.method.traits.trains_base
        trained = active if full else memory.trained_parameters
        queries = facts.num_attention_heads * facts.head_dim
        attention = layers * 2 * self._tokens_per_document * queries
        head = facts.vocab_size * facts.hidden_size
        labelled = min(1.0, self.lengths.labelled / max(1, self.lengths.tokens))
        per_token = (2 * active + attention) * passes + attention * backward + 2 * trained
        return self.tokens * (per_token + labelled * head * (6 if full else 4))

    @cached_property
    def utilisation(self) -> float:
        """Share of the GPUs' peak speed that is assumed; less where several wait for weights with little to compute."""
        busy = 1.0 if self.ranks == 1 else min(1.0, self.tokens_per_rank_step / EFFICIENT_ROW)
        return (UTILISATION_4_BIT if self.spec.tuning.method.traits.four_bit else UTILISATION) * busy

    @cached_property
    def hours(self) -> float | None:
        """Hours on the GPUs, at the assumed utilisation."""
        if self.gpu is None or not self.cuda:
            return None
        return self.flops / (self.ranks * self.gpu.flops * self.utilisation) / 3600

    # --- the plan ---

    def plan(self) -> Plan:
        """All of it, without warnings."""
        row, checkpointing = self.layout
        memory = self.memory(row, checkpointing)
        components = memory.components(row)
        total = sum(component.bytes for component in components)
        price = self.price_per_gpu_hour
        return Plan(
            world_size=self.ranks,
            steps=self.steps,
            examples=self.lengths.documents,
            tokens=self.tokens,
            tokens_per_rank_step=self.tokens_per_rank_step,
            trainable_parameters=memory.trained_parameters,
            parameters=self.shape.facts.parameters,
            micro_batch_tokens=row,
            micro_batches=self.rows_per_step(row),
            activation_checkpointing=checkpointing,
            memory=components,
            memory_bytes=total,
            host_bytes=memory.host(row, self.ranks_per_node),
            device_bytes=self.gpu.memory_bytes if self.gpu else None,
            fits=total <= self.gpu.memory_bytes if self.gpu else None,
            flops=self.flops,
            device=self.gpu.name if self.gpu else "",
            utilisation=self.utilisation if self.hours is not None else None,
            hours=self.hours,
            price=self.hours * self.ranks * price if self.hours is not None and price is not None else None,
        )


def plan_run(
    spec: FineTuneJobSpec,
    model: ModelFacts,
    lengths: LengthFacts,
    *,
    gpu: Gpu | None = None,
    price_per_gpu_hour: float | None = None,
    cpu_bf16: bool = False,
) -> Plan:
    """The plan of a run, with its warnings.

    The world is `spec.topology` (gpusPerNode left out: one GPU a node; 0: the CPU). `gpu` is the kind of GPU, by
    default the one that `topology.gpuType` names; None if that is unknown: then nothing is said about fitting.
    `cpu_bf16`: whether the CPU has instructions for bf16, where it computes.
    """
    topology = spec.topology
    if topology.gpus_per_node == 0:
        gpu = None
    elif gpu is None and topology.gpu_type is not None:
        gpu = find_gpu(topology.gpu_type)
    planner = Planner(spec, shape_of(model), lengths, gpu, price_per_gpu_hour, cpu_bf16)
    plan = planner.plan()
    return plan.model_copy(update={"warnings": list(_warnings(planner, plan))})


def planner_for(
    gpu: Gpu | None = None, price_per_gpu_hour: float | None = None, cpu_bf16: bool = False
) -> Callable[[FineTuneJobSpec, ModelFacts, LengthFacts], Plan]:
    """`plan_run` as `decide` wants it: with the GPU of the place, if it has one kind only, and its price."""

    def planner(spec: FineTuneJobSpec, model: ModelFacts, lengths: LengthFacts) -> Plan:
        return plan_run(spec, model, lengths, gpu=gpu, price_per_gpu_hour=price_per_gpu_hour, cpu_bf16=cpu_bf16)

    return planner


# --- what will go wrong ----------------------------------------------------------------------------------------------


def _warnings(planner: Planner, plan: Plan) -> Iterator[str]:
    if plan.fits is False:
        yield _does_not_fit(planner, plan)
    yield from _about_the_device(planner)
    yield from _about_the_data(planner, plan)
    yield from _about_the_ranks(planner, plan)


def _about_the_device(planner: Planner) -> Iterator[str]:
    topology, timeouts = planner.spec.topology, planner.spec.timeouts
    if planner.cuda and planner.gpu is None and topology.gpu_type is not None:
        names = [gpu.name for gpu in GPUS]
        near = nearest(topology.gpu_type, names)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(names)}."
        yield f"topology.gpuType {topology.gpu_type} is not known here, nor whether it fits: {hint}"
    if not planner.shape.known:
        yield (
            f"{planner.shape.facts.architecture} is not known here: its layers are taken to be Llama's, and memory "
            "and time are estimates."
        )
    deadline = timeouts.active_deadline_seconds
    if deadline is not None and planner.hours is not None and planner.hours * 3600 > deadline:
        yield (
            f"The training alone takes about {_duration(planner.hours)}, longer than "
            f"timeouts.activeDeadlineSeconds ({_duration(deadline / 3600)})."
        )


def _about_the_data(planner: Planner, plan: Plan) -> Iterator[str]:
    training, lengths, facts = planner.spec.training, planner.lengths, planner.shape.facts
    if 0 < facts.max_position_embeddings < lengths.longest:
        context = facts.max_position_embeddings
        yield (
            f"The longest example has {lengths.longest:,} tokens and the model's context {context:,}: "
            f"set training.maxSequenceLength to {context} at most."
        )
    if plan.steps < FEW_STEPS:
        batch = _smaller_batch(training.global_batch_size, plan)
        more = f"training.globalBatchSize {batch}" if batch < training.global_batch_size else "more data"
        yield f"{plan.steps} steps in all: the schedule has hardly begun when it ends; {more} or more epochs give more."
    if plan.trainable_parameters > PARAMETERS_PER_TOKEN * max(1, lengths.tokens):
        trained, tokens = _count(plan.trainable_parameters), _count(lengths.tokens)
        yield f"More parameters are trained ({trained}) than {tokens} tokens can fill{_smaller_adapter(planner)}."


def _smaller_batch(batch: int, plan: Plan) -> int:
    """A half, a third, … of the batch, in which the ranks share alike: the first with steps enough, or else one each.

    Never a little less than the batch: a few steps more would change nothing.
    """
    ranks = min(plan.world_size, batch)
    for part in range(2, batch + 1):
        smaller = max(batch // part // ranks, 1) * ranks
        if plan.steps * batch // smaller >= FEW_STEPS or smaller == ranks:
            return smaller
    return batch


def _smaller_adapter(planner: Planner) -> str:
    tuning = planner.spec.tuning
    if tuning.method.traits.trains_base:
        return f": tuning.method {tuning.method.traits.lighter[0]} trains fewer"
    if not tuning.method.traits.low_rank or tuning.lora.rank <= 2:
        return ""
    rank = max(2, tuning.lora.rank // 4)
    lora = tuning.lora.model_copy(update={"rank": rank})
    smaller = _changed(planner, tuning=tuning.model_copy(update={"lora": lora}))
    return f": tuning.lora.rank {rank} trains {_count(smaller.plan().trainable_parameters)}"


def _about_the_ranks(planner: Planner, plan: Plan) -> Iterator[str]:
    batch = planner.spec.training.global_batch_size
    if batch < plan.world_size:
        yield (
            f"training.globalBatchSize {batch} leaves {plan.world_size - batch} of {plan.world_size} ranks without an "
            "example in every step: raise it, or take fewer."
        )
    elif planner.cuda and plan.world_size > 1 and plan.tokens_per_rank_step < STARVING_TOKENS:
        enough = max(1, plan.world_size * plan.tokens_per_rank_step // STARVING_TOKENS)
        yield (
            f"The GPUs starve: each has {plan.tokens_per_rank_step:,} tokens a step and waits for weights most of the "
            f"time; {'one GPU' if enough == 1 else f'{enough} GPUs'} would do, or a larger training.globalBatchSize."
        )


# --- ways to make it fit ---------------------------------------------------------------------------------------------


def _does_not_fit(planner: Planner, plan: Plan) -> str:
    assert planner.gpu is not None
    has = f"an {plan.device}" if plan.device[0] in "AHL" else f"a {plan.device}"
    need = f"It does not fit: a GPU needs {_gib(plan.memory_bytes)} and {has} has {_gib(planner.gpu.memory_bytes)}"
    ways = []
    for name, way in _ways(planner):
        changed = way.plan()
        if changed.fits:
            ways.append(f"{name} ({_gib(changed.memory_bytes)})")
        if len(ways) == 3:
            break
    if not ways:
        return f"{need}. No single change makes it fit: choose a smaller model."
    count = {1: "One way", 2: "2 ways", 3: "3 ways"}[len(ways)]
    return f"{need}. {count} to make it fit: {'; '.join(ways)}."


def _ways(planner: Planner) -> Iterator[tuple[str, Planner]]:
    """Changes that lower the memory, the gentlest first."""
    spec = planner.spec
    tuning, training, topology = spec.tuning, spec.training, spec.topology
    if training.activation_checkpointing is False and tuning.method.traits.can_recompute:
        on = training.model_copy(update={"activation_checkpointing": True})
        yield "training.activationCheckpointing: true", _changed(planner, training=on)
    if topology.sharding == "hybrid" and topology.nodes > 1:
        yield "topology.sharding: full", _changed(planner, topology=topology.model_copy(update={"sharding": "full"}))
    for method in tuning.method.traits.lighter:
        if not (method.traits.four_bit and tuning.lora.init == "pissa"):
            yield f"tuning.method: {method}", _changed(planner, tuning=tuning.model_copy(update={"method": method}))
    yield from _more_gpus(planner)
    yield from _shorter_documents(planner)
    yield from _larger_gpu(planner)


def _more_gpus(planner: Planner) -> Iterator[tuple[str, Planner]]:
    topology = planner.spec.topology
    for factor in (2, 4, 8):
        if planner.ranks_per_node * factor <= 8:
            name, larger = "gpusPerNode", {"gpus_per_node": planner.ranks_per_node * factor}
        else:
            name, larger = "nodes", {"nodes": topology.nodes * factor}
        way = _changed(planner, topology=topology.model_copy(update=larger))
        if way.plan().fits:
            yield f"topology.{name}: {next(iter(larger.values()))}", way
            return


def _shorter_documents(planner: Planner) -> Iterator[tuple[str, Planner]]:
    """Half the longest document, and again, down to an eighth."""
    for divisor in (2, 4, 8):
        longest = planner.lengths.longest // divisor
        if longest < 256:
            return
        mean = min(planner.lengths.tokens, planner.lengths.documents * longest)
        lengths = planner.lengths.model_copy(update={"longest": longest, "tokens": mean})
        way = replace(planner, lengths=lengths)
        if way.plan().fits:
            yield f"training.maxSequenceLength: {longest}", way
            return


def _larger_gpu(planner: Planner) -> Iterator[tuple[str, Planner]]:
    assert planner.gpu is not None
    usual = [gpu for gpu in GPUS if gpu.name.startswith(("A100", "H100-80", "H200", "B200", "L40S"))]
    for gpu in sorted(usual, key=lambda gpu: gpu.memory_bytes):
        if gpu.memory_bytes > planner.gpu.memory_bytes:
            way = replace(planner, gpu=gpu)
            if way.plan().fits:
                yield f"topology.gpuType: {gpu.name}", way
                return


def _changed(planner: Planner, **update: object) -> Planner:
    return replace(planner, spec=planner.spec.model_copy(update=update))


# --- words -----------------------------------------------------------------------------------------------------------


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{max(1, round(hours * 60))} minutes"
