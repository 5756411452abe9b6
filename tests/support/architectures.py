"""Tiny random models of many architectures, without tokenizers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 260
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
COMMON = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
GPT = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _common(*without: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in COMMON.items() if name not in without} | changes


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return _common(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **fields})


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _common(),
    "llama yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "llama rope 3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "llama dynamic": _rope("dynamic", factor=2.0),
    "mistral": _common(sliding_window=6),
    "qwen2": _common(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": _common(),
    "gemma2": _common(sliding_window=6, final_logit_softcapping=1.0, attn_logit_softcapping=2.0),
    "gemma3_text": _common(sliding_window=6),
    "cohere": _common(logit_scale=0.25),
    "cohere2": _common("head_dim", sliding_window=6, logit_scale=0.25),
    "granite": _common(logits_scaling=4.0),
    "phi": _common("head_dim"),
    "phi3": _common(),
    "phi3 longrope": _common(
        "head_dim",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ),
    "opt": _common(
        "intermediate_size", "num_key_value_heads", "head_dim", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0
    ),
    "gpt2": GPT,
    "gptj": GPT | NO_DROPOUT | {"rotary_dim": 4},
    "gpt_neo": TOKENS
    | {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "resid_dropout": 0.0,
    },
    "gpt_neox": _common("num_key_value_heads", "head_dim"),
    "stablelm": _common("head_dim"),
    "starcoder2": _common("head_dim"),
    "olmo2": _common("head_dim"),
    "smollm3": _common("head_dim"),
    "glm4": _common(),
    "exaone4": _common("head_dim", sliding_window=6, sliding_window_pattern=2),
    "helium": _common(),
    "ernie4_5": _common(),
    "nanochat": _common("head_dim"),
    "apertus": _common("head_dim"),
    "seed_oss": _common(attention_dropout=0.0, residual_dropout=0.0),
    "falcon": _common("intermediate_size", "num_key_value_heads", "head_dim"),
    "falcon alibi": _common("intermediate_size", "num_key_value_heads", "head_dim", alibi=True, multi_query=False),
    "bloom": TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "nemotron": _common(),
    "lfm2": _common("head_dim", layer_types=["conv", "full_attention"]),
    "falcon_h1": _common(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1),
    "mixtral": _common(**LOCAL_EXPERTS),
    "qwen2_moe": _common("head_dim", **EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": _common(**EXPERTS),
    "qwen3_next": _common(
        **EXPERTS,
        shared_expert_intermediate_size=24,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "olmoe": _common("head_dim", num_experts=4, num_experts_per_tok=2),
    "granitemoe": _common("head_dim", **LOCAL_EXPERTS),
    "gpt_oss": _common(**LOCAL_EXPERTS, sliding_window=6),
    "llama4_text": _common(
        num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48, attention_chunk_size=16
    ),
    "deepseek_v3": _common(
        "head_dim",
        num_key_value_heads=4,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
"""Fields of the config by name; the first word of the name is the type of the model."""
USUAL = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2")
"""Those that every run of the tests compares in full; `make test-architectures` compares all."""


OTHERS: dict[str, dict[str, Any]] = {"mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}}
"""Those that cannot be trained."""


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of a tiny model of that name."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoConfig.for_model(
        name.split()[0], **((ARCHITECTURES | OTHERS)[name] | {"vocab_size": VOCABULARY} | changes)
    )


def tiny_architecture(directory: Path, name: str, **changes: Any) -> Path:
    """Write a random model of that name; its deviation from one seed to another is nil."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
        for parameter in model.parameters():  # larger than usual, so that attention and positions matter
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory
