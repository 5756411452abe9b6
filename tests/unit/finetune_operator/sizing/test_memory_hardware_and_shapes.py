"""GPUs are found by the names that people, drivers and node labels use; models by their repositories' names."""

from __future__ import annotations

import pytest

from finetune_operator.sizing.gpus import GIB, GPUS, find_gpu
from finetune_operator.sizing.model_shapes import FAMILIES, UnknownShapeError, known_model, model_facts, shape_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A100-80GB", "A100-80GB"),
        ("a100-80gb", "A100-80GB"),
        ("A100-80G", "A100-80GB"),
        ("NVIDIA-A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("A100", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("H200", "H200-141GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA A10G", "A10G-24GB"),
        ("Tesla T4", "T4-16GB"),
        ("Tesla-V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA-GeForce-RTX-4090", "RTX-4090-24GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada-48GB"),
        ("A100-SXM4-64GB", None),
        ("H1000", None),
        ("", None),
    ],
)
def test_a_gpu_is_found_by_any_of_its_names(text: str, name: str | None) -> None:
    gpu = find_gpu(text)
    assert (gpu.name if gpu else None) == name


def test_every_gpu_is_found_by_its_own_name_and_has_less_memory_than_it_says() -> None:
    for gpu in GPUS:
        assert find_gpu(gpu.name) == gpu
        assert gpu.memory_bytes < int(gpu.name.rpartition("-")[2].removesuffix("GB")) * GIB


@pytest.mark.parametrize(
    ("repo", "parameters"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", 8_030_261_248),
        ("mistralai/Mistral-7B-Instruct-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
    ],
)
def test_common_models_are_known_by_name_with_the_published_number_of_parameters(repo: str, parameters: int) -> None:
    facts = known_model(repo)
    assert facts is not None
    assert facts.parameters == parameters
    assert facts.architecture in FAMILIES


def test_other_models_are_not_guessed() -> None:
    assert known_model("acme/Llama-3-8B-but-different") is None
    assert known_model("acme/anything") is None


def test_a_config_says_what_it_leaves_out_by_its_defaults() -> None:
    facts = model_facts(LLAMA)
    assert (facts.num_key_value_heads, facts.head_dim, facts.tie_word_embeddings) == (4, 16, False)
    assert facts.parameters == shape_of(facts).parameters


def test_a_text_model_inside_another_is_found() -> None:
    inner = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert model_facts({"architectures": ["LlamaForCausalLM"], "text_config": inner}) == model_facts(LLAMA)


def test_a_config_without_sizes_is_refused_with_the_name_of_what_is_missing() -> None:
    with pytest.raises(UnknownShapeError, match=r"its config\.json has no num_hidden_layers"):
        model_facts({key: value for key, value in LLAMA.items() if key != "num_hidden_layers"})


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
        {"architectures": ["GPTNeoForCausalLM"], "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        {"architectures": ["BloomForCausalLM"], "hidden_size": 64, "n_layer": 2, "n_head": 4},
        {"architectures": ["MPTForCausalLM"], "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    ],
    ids=lambda config: config["architectures"][0],
)
def test_sizes_are_found_by_the_names_that_older_models_give_them(config: dict[str, object]) -> None:
    facts = model_facts(config | {"vocab_size": 100})
    assert (facts.hidden_size, facts.num_hidden_layers, facts.num_attention_heads) == (64, 2, 4)
    assert facts.tie_word_embeddings
    assert {layer.name.rpartition(".")[2] for layer in facts.linear_layers} & {
        "c_attn",
        "q_proj",
        "query_key_value",
        "Wqkv",
    }


def test_as_many_layers_as_a_config_claims_are_never_made() -> None:
    with pytest.raises(ValueError, match="less than or equal to 2000"):
        model_facts(LLAMA | {"architectures": ["FalconForCausalLM"], "num_hidden_layers": 10**9})
    with pytest.raises(ValueError, match="layer_types name too few layers"):
        model_facts(LLAMA | {"architectures": ["Lfm2ForCausalLM"], "num_hidden_layers": 5, "layer_types": ["conv"]})


def test_an_unknown_architecture_is_taken_for_a_llama_and_says_so() -> None:
    shape = shape_of(model_facts(LLAMA | {"architectures": ["SomethingForCausalLM"]}))
    assert not shape.known
    assert shape.parameters == model_facts(LLAMA).parameters


def test_experts_have_the_width_that_their_parameters_leave() -> None:
    config = LLAMA | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    }
    facts = model_facts(config)
    assert shape_of(facts).expert_width == 48
    assert shape_of(facts).parameters == facts.parameters
    assert shape_of(facts).active_parameters < facts.parameters
