"""Tiny random models of several architectures, without tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def tiny_architecture(directory: Path, model_type: str, **changes: Any) -> Path:
    """Write a random model of that type; its deviation from one seed to another is nil."""
    common = {} if model_type == "gpt2" else COMMON
    common = common | {"vocab_size": 260}
    config = AutoConfig.for_model(model_type, **(common | ARCHITECTURES[model_type] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # larger than usual, so that attention and positions matter
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory
