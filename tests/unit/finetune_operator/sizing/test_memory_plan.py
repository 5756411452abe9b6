"""What a plan promises: rows that hold the longest document, memory that adds up, advice that was tried."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.jobs import job

from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.traits import Method
from finetune_operator.sizing.gpus import GIB, GpuType, find_gpu
from finetune_operator.sizing.model_shapes import known_model, model_facts
from finetune_operator.sizing.plan import _smaller_batch, plan_run, planner_for
from finetune_operator.sizing.planner import CPU_ROW, ROW_BUDGET

LLAMA_8B = known_model("meta-llama/Meta-Llama-3-8B-Instruct")
LLAMA_70B = known_model("meta-llama/Llama-3.3-70B-Instruct")
SMOL = known_model("HuggingFaceTB/SmolLM2-135M")
assert LLAMA_8B is not None
assert LLAMA_70B is not None
assert SMOL is not None
LONG = LengthFacts(documents=20_000, tokens=40_000_000, longest=4096, labelled=8_000_000)
SHORT = LengthFacts(documents=20_000, tokens=1_400_000, longest=300, labelled=80_000)


def _spec(method: str = "lora", **changes: Any) -> FineTuneJobSpec:
    paths = {f"spec.{path.replace('__', '.')}": value for path, value in changes.items()}
    return job({"spec.tuning.method": method, "spec.training.globalBatchSize": 96} | paths).spec


def _plan(spec: FineTuneJobSpec, model: ModelFacts = LLAMA_8B, lengths: LengthFacts = LONG, **known: Any) -> Plan:
    return plan_run(spec, model, lengths, **known)


def _on(gpu: str, gpus: int = 1, nodes: int = 1) -> dict[str, Any]:
    return {"topology": {"nodes": nodes, "gpusPerNode": gpus, "gpuType": gpu}}


def test_components_add_up_to_the_peak() -> None:
    plan = _plan(_spec("qlora", **_on("A100-80GB", 4, 3)))
    assert sum(component.bytes for component in plan.memory) == plan.memory_bytes
    assert plan.fits
    assert plan.device == "A100-80GB"
    assert plan.world_size == 12


def test_the_reference_case_fits_with_room_and_says_that_twelve_gpus_are_many() -> None:
    plan = _plan(_spec("qlora", **_on("A100-80GB", 4, 3)), lengths=SHORT)
    assert plan.memory_bytes < 20 * GIB
    assert any(warning.startswith("GPUs would be mostly idle") for warning in plan.warnings)


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(["full", "lora", "qlora", "prompt", "prefix"]),
    gpu=st.sampled_from(["T4", "L4", "A100-40GB", "H100", "B200"]),
    gpus=st.sampled_from([0, 1, 2, 8]),
    nodes=st.sampled_from([1, 2, 16]),
    longest=st.integers(1, 20_000),
    documents=st.integers(1, 100_000),
    batch=st.integers(1, 2000),
)
def test_any_run_gets_rows_that_hold_its_longest_document(
    method: str, gpu: str, gpus: int, nodes: int, longest: int, documents: int, batch: int
) -> None:
    topology = {"nodes": nodes, "gpusPerNode": gpus} | ({"gpuType": gpu} if gpus else {})
    tokens = documents * max(1, longest // 2)
    lengths = LengthFacts(documents=documents, tokens=tokens, longest=longest, labelled=min(tokens, documents * 3))
    plan = _plan(_spec(method, topology=topology, training__globalBatchSize=batch), lengths=lengths)
    assert plan.micro_batch_tokens >= longest
    assert plan.memory_bytes > 0
    assert plan.steps >= 1
    assert (plan.fits is None) == (gpus == 0)
    if plan.fits and plan.device_bytes and plan.micro_batch_tokens > 2 * longest + 512:
        assert plan.memory_bytes <= ROW_BUDGET * plan.device_bytes
    if gpus == 0:
        assert plan.micro_batch_tokens >= CPU_ROW


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_more_ranks_never_need_more_memory_each_for_the_same_row(method: str) -> None:
    def memory(gpus: int) -> int:
        lengths = LONG.model_copy(update={"longest": 4096, "documents": 96, "tokens": 96 * 4096})
        plan = _plan(_spec(method, **_on("B200", gpus), training__activationCheckpointing=True), LLAMA_8B, lengths)
        return next(component.bytes for component in plan.memory if component.name == "weights")

    assert memory(2) > memory(4) > memory(8)


def test_hybrid_sharding_holds_a_nodes_share() -> None:
    def weights(sharding: str) -> int:
        plan = _plan(_spec("full", topology={"nodes": 4, "gpusPerNode": 8, "gpuType": "H100", "sharding": sharding}))
        return next(component.bytes for component in plan.memory if component.name == "weights")

    assert weights("hybrid") == pytest.approx(4 * weights("full"), rel=0.01)


def test_activations_are_recomputed_only_where_memory_needs_it() -> None:
    assert not _plan(_spec("qlora", **_on("A100-80GB"))).activation_checkpointing
    assert _plan(_spec("qlora", **_on("RTX-4090"))).activation_checkpointing
    assert _plan(_spec("qlora", **_on("A100-80GB"), training__activationCheckpointing=True)).activation_checkpointing
    off = _plan(_spec("lora", **_on("RTX-4090"), training__activationCheckpointing=False))
    assert not off.activation_checkpointing
    assert off.fits is False
    assert "training.activationCheckpointing: true" in off.warnings[0]


def test_prefix_tuning_is_never_told_to_recompute() -> None:
    assert not _plan(_spec("prefix", **_on("T4"))).activation_checkpointing


WAYS = {
    "tuning.method": lambda spec, value: spec.model_copy(
        update={"tuning": spec.tuning.model_copy(update={"method": Method(value)})}
    ),
    "topology.gpusPerNode": lambda spec, value: spec.model_copy(
        update={"topology": spec.topology.model_copy(update={"gpus_per_node": int(value)})}
    ),
    "topology.nodes": lambda spec, value: spec.model_copy(
        update={"topology": spec.topology.model_copy(update={"nodes": int(value)})}
    ),
    "topology.gpuType": lambda spec, value: spec.model_copy(
        update={"topology": spec.topology.model_copy(update={"gpu_type": value})}
    ),
    "topology.sharding": lambda spec, value: spec.model_copy(
        update={"topology": spec.topology.model_copy(update={"sharding": value})}
    ),
    "training.activationCheckpointing": lambda spec, value: spec.model_copy(
        update={"training": spec.training.model_copy(update={"activation_checkpointing": value == "true"})}
    ),
}


@pytest.mark.parametrize(
    ("spec", "model"),
    [
        (_spec("full", **_on("A100-80GB")), LLAMA_8B),
        (_spec("full", **_on("A100-80GB", 8)), LLAMA_70B),
        (_spec("lora", **_on("T4")), LLAMA_8B),
        (_spec("lora", **_on("RTX-4090"), training__activationCheckpointing=False), LLAMA_8B),
        (
            _spec("full", topology={"nodes": 8, "gpusPerNode": 1, "gpuType": "H100", "sharding": "hybrid"}),
            LLAMA_8B,
        ),
    ],
    ids=["full 8B on one", "full 70B on eight", "lora 8B on a T4", "not recomputed", "hybrid over single GPUs"],
)
def test_each_way_to_make_it_fit_does_make_it_fit(spec: FineTuneJobSpec, model: ModelFacts) -> None:
    plan = _plan(spec, model)
    assert plan.fits is False
    advice = plan.warnings[0]
    assert advice.startswith(f"Does not fit: each GPU needs {plan.memory_bytes / GIB:.1f} GiB, and ")
    ways = re.findall(r"(t[a-z]+\.[a-zA-Z]+): ([A-Za-z0-9-]+) \(([0-9.]+) GiB\)", advice)
    assert 1 <= len(ways) <= 3
    for path, value, size in ways:
        if path == "training.maxSequenceLength":
            continue
        changed = _plan(WAYS[path](spec, value), model)
        assert changed.fits, (path, value)
        assert f"{changed.memory_bytes / GIB:.1f}" == size


def test_where_nothing_helps_it_is_said() -> None:
    tiny = GpuType("Tiny-1GB", 1 * GIB, 1e12)
    plan = _plan(_spec("qlora", topology={"gpusPerNode": 8, "nodes": 4096}), LLAMA_70B, LONG, gpu=tiny)
    assert plan.fits is False
    assert "it fit:" in plan.warnings[0] or "choose a smaller model" in plan.warnings[0]


def test_few_steps_are_said_with_a_batch_that_gives_more() -> None:
    lengths = LengthFacts(documents=600, tokens=60_000_000, longest=200_000, labelled=600_000)
    plan = _plan(_spec("lora", training__globalBatchSize=100, **_on("B200", 8)), SMOL, lengths)
    assert plan.steps == 12
    [warning] = [sentence for sentence in plan.warnings if "Only 12 optimizer steps" in sentence]
    assert "Lower training.globalBatchSize to 24, or raise training.epochs." in warning
    enough = _plan(_spec("lora", training__globalBatchSize=24, **_on("B200", 8)), SMOL, lengths)
    assert enough.steps == 50
    assert not any("optimizer steps" in sentence for sentence in enough.warnings)


@pytest.mark.parametrize(("batch", "steps", "ranks", "advised"), [(16, 49, 1, 8), (100, 12, 8, 24), (8, 5, 8, 8)])
def test_the_batch_that_gives_more_steps_gives_many_more_and_is_shared_alike(
    batch: int, steps: int, ranks: int, advised: int
) -> None:
    plan = _plan(_spec("lora", **_on("B200"))).model_copy(update={"steps": steps, "world_size": ranks})
    assert _smaller_batch(batch, plan) == advised


def test_more_parameters_than_tokens_can_fill_are_said_with_a_rank_that_is_filled_better() -> None:
    few = LengthFacts(documents=1000, tokens=100_000, longest=300, labelled=4000)
    [warning] = [w for w in _plan(_spec("lora", **_on("H100")), lengths=few).warnings if "overfitting" in w]
    assert "41.9 M trained parameters for 100 k training tokens" in warning
    assert "tuning.lora.rank: 4 would train 10.5 M." in warning
    assert not any("overfitting" in w for w in _plan(_spec("lora", **_on("H100"))).warnings)


def test_ranks_without_an_example_are_said() -> None:
    plan = _plan(_spec("lora", training__globalBatchSize=8, **_on("A100-80GB", 4, 3)))
    assert any("leaves 4 of 12 ranks without an example" in warning for warning in plan.warnings)


def test_documents_beyond_the_models_context_are_said() -> None:
    lengths = LONG.model_copy(update={"longest": 16_384})
    plan = _plan(_spec("lora", **_on("B200")), lengths=lengths)
    assert any("context of 8,192" in warning and "maxSequenceLength to 8192" in warning for warning in plan.warnings)


def test_an_unknown_gpu_is_said_with_a_near_match_and_nothing_is_promised() -> None:
    plan = _plan(_spec("lora", **_on("A1000-80GB")))
    assert plan.fits is None
    assert plan.hours is None
    [warning] = [sentence for sentence in plan.warnings if "gpuType" in sentence]
    assert "Did you mean A100-80GB?" in warning


def test_an_unknown_architecture_is_said() -> None:
    other = LLAMA_8B.model_copy(update={"architecture": "NewForCausalLM"})  # type: ignore[union-attr]
    assert any("Unknown architecture NewForCausalLM" in warning for warning in _plan(_spec(), other).warnings)


def test_experts_that_stay_untrained_and_packing_that_is_refused_are_said() -> None:
    config = {"architectures": ["GptOssForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    model = model_facts(config | {"num_attention_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2})
    warnings = _plan(_spec(training__packing=True), model).warnings
    assert any("leaves the experts of GptOssForCausalLM untrained: name down_proj, gate_up_proj" in w for w in warnings)
    assert any("Will be refused: GptOssForCausalLM has attention sinks" in w for w in warnings)
    named = _spec(tuning__lora={"targetModules": "gate_up_proj,down_proj"})
    plan = _plan(named, model)
    assert not any("untrained" in warning or "refused" in warning for warning in plan.warnings)
    assert plan.trainable_parameters == 2 * 4 * 16 * ((2 * 256 + 64) + (64 + 256))


def test_a_deadline_that_is_too_short_is_said() -> None:
    spec = _spec("full", **_on("A100-80GB", 8), timeouts__activeDeadlineSeconds=600)
    assert any("longer than timeouts.activeDeadlineSeconds (10 minutes)" in warning for warning in _plan(spec).warnings)


def test_time_and_price_follow_from_operations_and_speed() -> None:
    plan = _plan(_spec("lora", **_on("A100-80GB", 8)), price_per_gpu_hour=2.5)
    assert plan.hours is not None
    assert plan.utilisation is not None
    gpu = find_gpu("A100-80GB")
    assert gpu is not None
    assert plan.hours == pytest.approx(plan.flops / (8 * gpu.flops * plan.utilisation) / 3600)
    assert plan.price == pytest.approx(plan.hours * 8 * 2.5)
    assert _plan(_spec("lora", **_on("A100-80GB", 8))).price is None


def test_lora_takes_two_thirds_of_full_tunings_operations_and_upper_layers_less() -> None:
    def flops(method: str, **changes: Any) -> float:
        spec = _spec(method, **_on("B200", 8), training__activationCheckpointing=False, **changes)
        return _plan(spec, lengths=SHORT).flops

    full, lora, upper = flops("full"), flops("lora"), flops("lora", tuning__lora__layers="16-31")
    assert full == pytest.approx(6 * 8.03e9 * 2 * SHORT.tokens, rel=0.2)
    assert lora == pytest.approx(full * 4 / 6, rel=0.05)
    assert upper == pytest.approx(lora * 3 / 4, rel=0.05)


def test_a_cpu_gets_rows_that_it_computes_well_and_no_promise_about_time() -> None:
    plan = _plan(_spec("lora", topology={"nodes": 2, "gpusPerNode": 0}), SMOL, SHORT)
    assert plan.micro_batch_tokens == CPU_ROW
    assert (plan.fits, plan.hours, plan.device) == (None, None, "")
    assert plan.world_size == 2
    assert plan.host_bytes >= plan.memory_bytes


def test_a_cpu_with_instructions_for_bf16_holds_half_the_weights() -> None:
    spec = _spec("lora", topology={"nodes": 2, "gpusPerNode": 0})
    without, having = (_plan(spec, SMOL, SHORT, cpu_bf16=there).memory[0].bytes for there in (False, True))
    assert without == 2 * having


def test_gpus_without_bf16_compute_in_float32() -> None:
    t4 = _plan(_spec("lora", **_on("T4", 8)), SMOL, SHORT)
    l4 = _plan(_spec("lora", **_on("L4", 8)), SMOL, SHORT)
    weights = [next(c.bytes for c in plan.memory if c.name == "weights") for plan in (t4, l4)]
    assert weights[0] == 2 * weights[1]


def test_gradients_of_adapters_are_whole_while_micro_batches_add_up() -> None:
    def gradients(batch: int) -> int:
        plan = _plan(_spec("lora", training__globalBatchSize=batch, **_on("L40S", 8)))
        return next(component.bytes for component in plan.memory if component.name == "gradients")

    assert gradients(800) > 5 * gradients(8)


def test_the_planner_of_decide_knows_the_gpu_of_the_place() -> None:
    gpu = find_gpu("L4")
    spec = _spec("qlora")
    plan = planner_for(gpu, 0.5)(spec, LLAMA_8B, SHORT)
    assert plan.device == "L4-24GB"
    assert plan.price is not None
