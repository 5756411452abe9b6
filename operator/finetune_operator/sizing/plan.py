"""The plan of a run before a GPU is taken, with warnings about what will go wrong.

Pure. Advice has been tried: each change that is proposed to make a run fit was planned, and fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from finetune_api.architectures import never_packs
from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import nearest
from finetune_operator.sizing.gpus import GIB, GPUS, GpuType, find_gpu
from finetune_operator.sizing.model_shapes import shape_of
from finetune_operator.sizing.planner import Planner

FEW_STEPS = 50
IDLE_TOKENS = 1024
"""Tokens per GPU and step below which a GPU waits for weights more than it computes."""
PARAMETERS_PER_TOKEN = 10
"""Trained parameters per training token above which overfitting is likely."""


def plan_run(
    spec: FineTuneJobSpec,
    model: ModelFacts,
    lengths: LengthFacts,
    *,
    gpu: GpuType | None = None,
    price_per_gpu_hour: float | None = None,
    cpu_bf16: bool = False,
) -> Plan:
    """The plan of a run, with its warnings.

    gpu: by default the type that `topology.gpuType` names; where that is unknown, fitting is not checked.
    A topology without gpusPerNode means one GPU per node, 0 the CPU. cpu_bf16: the CPU has instructions for bf16.
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
    gpu: GpuType | None = None, price_per_gpu_hour: float | None = None, cpu_bf16: bool = False
) -> Callable[[FineTuneJobSpec, ModelFacts, LengthFacts], Plan]:
    """`plan_run` as `decide` calls it, with what is known of the place: its GPU, if it has one type only, and price."""

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
        hint = f"Did you mean {near}?" if near else f"Known types: {', '.join(names)}."
        yield f"Unknown topology.gpuType {topology.gpu_type}, so memory and time are not checked. {hint}"
    if not planner.shape.known:
        yield (
            f"Unknown architecture {planner.shape.facts.architecture}: its layers are assumed to be like Llama's, so "
            "memory and time are rough estimates."
        )
    yield from _about_the_architecture(planner)
    deadline = timeouts.active_deadline_seconds
    if deadline is not None and planner.hours is not None and planner.hours * 3600 > deadline:
        yield (
            f"Training alone takes about {_duration(planner.hours)}, longer than "
            f"timeouts.activeDeadlineSeconds ({_duration(deadline / 3600)})."
        )


def _about_the_architecture(planner: Planner) -> Iterator[str]:
    facts, tuning = planner.shape.facts, planner.spec.tuning
    if planner.spec.training.packing and (why := never_packs(facts.architecture)):
        yield f"Will be refused: {why} Remove training.packing."
    left_out = sorted({linear.name.rpartition(".")[2] for linear in facts.linear_layers if linear.left_out})
    if tuning.method.traits.low_rank and tuning.lora.target_modules == "all-linear" and left_out:
        yield (
            f"all-linear leaves the experts of {facts.architecture} untrained: name {', '.join(left_out)} in "
            "tuning.lora.targetModules to train them."
        )


def _about_the_data(planner: Planner, plan: Plan) -> Iterator[str]:
    training, lengths, facts = planner.spec.training, planner.lengths, planner.shape.facts
    if 0 < facts.max_position_embeddings < lengths.longest:
        context = facts.max_position_embeddings
        yield (
            f"The longest example has {lengths.longest:,} tokens, more than the model's context of {context:,}. "
            f"Set training.maxSequenceLength to {context} or less."
        )
    if plan.steps < FEW_STEPS:
        batch = _smaller_batch(training.global_batch_size, plan)
        more = f"Lower training.globalBatchSize to {batch}" if batch < training.global_batch_size else "Add data"
        steps = f"{plan.steps} optimizer step{'' if plan.steps == 1 else 's'}"
        yield f"Only {steps}, too few for the learning-rate schedule. {more}, or raise training.epochs."
    if plan.trainable_parameters > PARAMETERS_PER_TOKEN * max(1, lengths.tokens):
        trained, tokens = _count(plan.trainable_parameters), _count(lengths.tokens)
        way = _smaller_adapter(planner)
        yield f"{trained} trained parameters for {tokens} training tokens: risk of overfitting.{way}"


def _smaller_batch(batch: int, plan: Plan) -> int:
    """The largest half, third, … of the batch that splits evenly over the ranks and gives enough steps.

    One example per rank where none gives enough. Never just below the batch: a few more steps would change nothing.
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
        return f" tuning.method: {tuning.method.traits.lighter[0]} would train fewer."
    if not tuning.method.traits.low_rank or tuning.lora.rank <= 2:
        return ""
    rank = max(2, tuning.lora.rank // 4)
    lora = tuning.lora.model_copy(update={"rank": rank})
    smaller = _changed(planner, tuning=tuning.model_copy(update={"lora": lora}))
    return f" tuning.lora.rank: {rank} would train {_count(smaller.plan().trainable_parameters)}."


def _about_the_ranks(planner: Planner, plan: Plan) -> Iterator[str]:
    batch = planner.spec.training.global_batch_size
    if batch < plan.world_size:
        yield (
            f"training.globalBatchSize {batch} leaves {plan.world_size - batch} of {plan.world_size} ranks without an "
            "example in every step. Raise it, or use fewer ranks."
        )
    elif planner.cuda and plan.world_size > 1 and plan.tokens_per_rank_step < IDLE_TOKENS:
        enough = max(1, plan.world_size * plan.tokens_per_rank_step // IDLE_TOKENS)
        yield (
            f"GPUs would be mostly idle ({plan.tokens_per_rank_step:,} tokens per GPU and step). "
            f"Use {'one GPU' if enough == 1 else f'{enough} GPUs'}, or a larger training.globalBatchSize."
        )


# --- ways to make it fit ---------------------------------------------------------------------------------------------


def _does_not_fit(planner: Planner, plan: Plan) -> str:
    assert planner.gpu is not None
    has = f"an {plan.device}" if plan.device[0] in "AHL" else f"a {plan.device}"
    need = f"Does not fit: each GPU needs {gib(plan.memory_bytes)}, and {has} has {gib(planner.gpu.memory_bytes)}."
    ways = []
    for name, way in _ways(planner):
        changed = way.plan()
        if changed.fits:
            ways.append(f"{name} ({gib(changed.memory_bytes)})")
        if len(ways) == 3:
            break
    if not ways:
        return f"{need} No single change makes it fit: choose a smaller model."
    changes = "This change makes" if len(ways) == 1 else "Any of these changes makes"
    return f"{need} {changes} it fit: {'; '.join(ways)}."


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


def gib(size: int) -> str:
    """`12.3 GiB`, `0.12 GiB`."""
    return f"{size / GIB:.2f} GiB" if size < GIB else f"{size / GIB:.1f} GiB"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{max(1, round(hours * 60))} minutes"
