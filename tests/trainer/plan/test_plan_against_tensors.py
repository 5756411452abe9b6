"""The plan's arithmetic against the tensors that the trainer really makes: weights, gradients, optimiser, adapters."""

from __future__ import annotations

import pytest
import torch
from tests.support.architectures import ARCHITECTURES, tiny_config
from tests.support.measured_memory import Case, config_json, imaginary_ranks, llama_3_8b
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from finetune_api.spec import Quantization, Tuning
from finetune_api.traits import Method
from finetune_operator.sizing.memory import Memory, Run, constants_bytes
from finetune_operator.sizing.model_shapes import FAMILIES, model_facts, shape_of
from finetune_trainer.failures import TrainerError
from finetune_trainer.model import adapters, build, nf4
from finetune_trainer.model.sharding import shard
from finetune_trainer.model.weights import empty_model
from finetune_trainer.train.optimizer import Optimizer

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODEL_TYPES = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"head_dim": 32}),
    "SmolLM3ForCausalLM": ("smollm3", {}),
    "GraniteForCausalLM": ("granite", {}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {"head_dim": 32}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "GemmaForCausalLM": ("gemma", {"head_dim": 32}),
    "Gemma2ForCausalLM": ("gemma2", {"head_dim": 32}),
    "Gemma3ForCausalLM": ("gemma3_text", {"head_dim": 32}),
    "Phi3ForCausalLM": ("phi3", {}),
    "Starcoder2ForCausalLM": ("starcoder2", {}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 4, "head_dim": 32, "moe_intermediate_size": 48}),
}


def _config(architecture: str, **changes: object) -> PretrainedConfig:
    kind, own = MODEL_TYPES[architecture]
    return AutoConfig.for_model(kind, **(SMALL | own | changes))


def _with_architecture(config: PretrainedConfig, architecture: str) -> dict[str, object]:
    return config_json(config) | {"architectures": [architecture]}


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_tensor_of_a_known_architecture_is_counted(architecture: str, tied: bool) -> None:
    config = _config(architecture, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    real = sum(parameter.numel() for parameter in model.parameters())
    facts = model_facts(_with_architecture(config, architecture))
    assert facts.parameters == real
    shape = shape_of(facts)
    assert shape.known
    assert shape.parameters == real


@pytest.mark.parametrize("architecture", FAMILIES)
def test_adapters_go_where_the_trainer_puts_them(architecture: str) -> None:
    config = _config(architecture)
    tuning = Tuning.model_validate({"method": "lora", "lora": {"rank": 4, "dora": False}})
    base = empty_model(config, torch.float32)
    adapters.attach(base, tuning)
    real = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    shape = shape_of(model_facts(_with_architecture(config, architecture)))
    assert Memory(shape, Run(tuning=tuning)).trained_parameters == real > 0


SOME = r".*\.(q_proj|q_a_proj|c_attn|query_key_value|qkv_proj|Wqkv|experts\.(gate_up|down)_proj)"


@pytest.mark.parametrize("fields", [{}, {"layers": "1"}, {"targetModules": SOME}], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_counts_what_is_trained_of_every_architecture(name: str, fields: dict[str, object]) -> None:
    tuning = Tuning.model_validate({"method": "lora", "lora": {"rank": 2, **fields}})
    base = empty_model(tiny_config(name), torch.float32)
    json = config_json(base.config) | {"architectures": [type(base).__name__]}
    if "layers" in fields and name == "qwen3_next":
        with pytest.raises(TrainerError, match=r"PEFT would adapt .*experts too, which is in none of the layers 1"):
            adapters.attach(base, tuning)
        return
    adapters.attach(base, tuning)
    real = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    assert Memory(shape_of(model_facts(json)), Run(tuning=tuning)).trained_parameters == real > 0


METHODS = {
    "lora": {"method": "lora"},
    "lora, some modules": {"method": "lora", "lora": {"targetModules": "q_proj, v_proj", "rank": 8}},
    "lora, a regular expression": {"method": "lora", "lora": {"targetModules": r".*\.[01]\.mlp\.(up|down)_proj"}},
    "lora, upper layers": {"method": "lora", "lora": {"layers": "1-2"}},
    "lora, head": {"method": "lora", "lora": {"targetModules": "q_proj,lm_head"}},
    "lora, embedding": {"method": "lora", "lora": {"targetModules": "v_proj,embed_tokens"}},
    "lora, head trained whole": {"method": "lora", "lora": {"modulesToSave": ["lm_head"]}},
    "dora": {"method": "lora", "lora": {"dora": True}},
    "full": {"method": "full"},
    "prompt": {"method": "prompt", "prompt": {"virtualTokens": 7}},
    "prefix": {"method": "prefix", "prefix": {"virtualTokens": 7}},
}


@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_bytes_at_rest_are_those_of_the_shards(how: dict[str, object], ranks: int) -> None:
    """Llama-3-8B's own widths, so that nothing divides evenly by accident; three layers."""
    case = Case(llama_3_8b(layers=3), Tuning.model_validate(how), ranks=ranks)
    with imaginary_ranks(ranks):
        root, base = case.empty()
        mesh = init_device_mesh("cpu", (ranks,))
        shard(root, list(adapters.decoder_layers(base)), [base.get_input_embeddings()], mesh, case.precision)
    real = {True: 0, False: 0}
    for parameter in root.parameters():
        assert isinstance(parameter, DTensor)
        real[parameter.requires_grad] += parameter.to_local().untyped_storage().nbytes()
    planned = case.planned()
    trained = planned.weights if case.tuning.method is Method.FULL else planned.adapters
    frozen = 0 if case.tuning.method is Method.FULL else planned.weights
    assert trained == pytest.approx(real[True], rel=0.01)
    assert frozen == pytest.approx(real[False], rel=0.01)
    assert planned.gradients == pytest.approx(real[True], rel=0.01)
    whole = sum(p.numel() for p in root.parameters() if p.requires_grad)
    assert planned.trained_parameters == whole


@pytest.mark.parametrize("how", [METHODS["lora"], METHODS["full"], METHODS["dora"]], ids=["lora", "full", "dora"])
def test_the_optimiser_holds_what_is_planned(how: dict[str, object]) -> None:
    case = Case(llama_3_8b(layers=1, vocab_size=512), Tuning.model_validate(how), ranks=1, bf16=False)
    root, _ = case.empty()
    optimizer = Optimizer({name: p for name, p in root.named_parameters() if p.requires_grad})
    moments = [value for key, value in optimizer.tensors().items() if not key.startswith("model.")]
    real = sum(value.numel() * value.element_size() for value in moments)
    assert case.planned().optimizer == pytest.approx(real, rel=0.01)


def test_llama_3_8b_as_a_whole() -> None:
    case = Case(llama_3_8b(), Tuning.model_validate(METHODS["lora"]), ranks=8)
    root, _ = case.empty()
    frozen = sum(p.numel() for p in root.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in root.parameters() if p.requires_grad)
    planned = case.planned()
    assert frozen == 8_030_261_248
    assert planned.trained_parameters == trained == 41_943_040
    assert planned.weights == pytest.approx(2 * frozen / 8, rel=0.01)
    assert planned.adapters == planned.gradients == pytest.approx(4 * trained / 8, rel=0.01)
    assert planned.optimizer == pytest.approx(8 * trained / 8, rel=0.01)


@pytest.mark.parametrize("double", [True, False], ids=["double quantisation", "single"])
def test_four_bit_weights_and_their_constants(double: bool) -> None:
    quantization = Quantization(double_quant=double)
    tuning = Tuning(method=Method.QLORA, quantization=quantization)
    config = llama_3_8b(layers=1, hidden_size=512, intermediate_size=1408, num_attention_heads=4, num_key_value_heads=2)
    planned = Case(config, tuning).planned()
    packed = constants = 0
    for linear in nf4.quantized_modules(empty_model(config, torch.bfloat16)).values():
        parts = nf4.quantize(torch.randn(linear.weight.shape), quantization)
        packed += parts.pop("").nbytes
        constants += sum(part.nbytes for name, part in parts.items() if "quant_state" not in name)
    shape = shape_of(model_facts(config_json(config)))
    assert constants_bytes(shape, tuning) == pytest.approx(constants, rel=0.01)
    alone = Memory(shape, Run(tuning=tuning, ranks=1)).weights
    unpacked = 2 * (2 * config.vocab_size * 512 + 3 * 512)
    assert alone - unpacked == packed
    assert planned.weights == pytest.approx(alone / 4, rel=0.01)


def test_a_trained_model_is_built_from_the_same_configs() -> None:
    """The yardstick builds what `load_model` builds: if that changes, this test is what has to follow."""
    assert build.CausalModel.__init__.__kwdefaults__ is None
    root, base = Case(llama_3_8b(layers=1), Tuning(method=Method.QLORA)).empty()
    assert len(nf4.linear_4bit(base)) == 7
    assert {p.dtype for p in root.parameters() if p.requires_grad} == {torch.float32}
