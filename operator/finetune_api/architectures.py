"""What is known of model architectures by name, before one is loaded: whether they pack, and where adapters go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finetune_api.report import MAX_LAYERS, LinearLayers

_READS_MASKS = "takes positions and neighbours from the padding mask"
_HAS_STATE = "has layers whose state runs on from one document into the next"

WITHOUT_PACKING = {
    "BloomForCausalLM": _READS_MASKS,
    "FalconForCausalLM": _READS_MASKS,
    "MptForCausalLM": _READS_MASKS,
    "FalconH1ForCausalLM": _HAS_STATE,
    "Lfm2ForCausalLM": _HAS_STATE,
    "Qwen3NextForCausalLM": _HAS_STATE,
    "GptOssForCausalLM": "has attention sinks",
    "NemotronForCausalLM": "has no attention that keeps documents apart",
}
"""Architectures whose packed examples would see each other, and why; the trainer pads instead, and measures others."""


def never_packs(architecture: str) -> str:
    """A sentence that says why examples are never packed for this architecture; empty where they can be."""
    why = WITHOUT_PACKING.get(architecture.replace("MPT", "Mpt"))
    return f"{architecture} {why}, so packed examples would see each other." if why else ""


# --- the sizes in a config -------------------------------------------------------------------------------------------

NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
"""What configs call a size; the usual name first."""


def size(config: dict[str, Any], name: str, default: int = 0) -> int:
    """A size of a config.json by its usual name. Raises TypeError or ValueError for what is no number."""
    return int(next((config[other] for other in NAMES.get(name, (name,)) if config.get(other)), default))


# --- where adapters go -----------------------------------------------------------------------------------------------

Layers = Iterator[LinearLayers]


class _Sizes:
    """The sizes that most architectures share, and short ways to say which linear layers there are."""

    def __init__(self, config: dict[str, Any], prefix: str) -> None:
        self.config, self.prefix = config, prefix
        self.hidden, self.heads = size(config, "hidden_size"), size(config, "num_attention_heads")
        self.head = size(config, "head_dim", self.hidden // max(1, self.heads))
        self.queries, self.keys = self.heads * self.head, size(config, "num_key_value_heads", self.heads) * self.head
        self.width = size(config, "intermediate_size", 4 * self.hidden)
        self.every = range(min(size(config, "num_hidden_layers"), MAX_LAYERS))

    def __getitem__(self, name: str) -> int:
        return size(self.config, name)

    def make(self, parent: str, leaves: str, out: int, into: int, layers: Sequence[int] | None = None) -> Layers:
        """The same sizes for each of the leaves, in these layers or in all."""
        if layers is not None and not layers:
            return
        some = [] if layers is None or len(layers) == len(self.every) else list(layers)
        for leaf in leaves.split():
            name = ".".join(part for part in (self.prefix, "*", parent, leaf) if part)
            yield LinearLayers(name=name, out=out, into=into, layers=some)

    def attention(self, output: str = "o_proj", layers: Sequence[int] | None = None) -> Layers:
        """q, k, v and the output."""
        yield from self.make("self_attn", "q_proj", self.queries, self.hidden, layers)
        yield from self.make("self_attn", "k_proj v_proj", self.keys, self.hidden, layers)
        yield from self.make("self_attn", output, self.hidden, self.queries, layers)

    def fused_attention(self, parent: str, first: str, last: str, out: int = 0) -> Layers:
        """q, k and v in one product of that many rows, three times the model's width by default, and the output."""
        yield from self.make(parent, first, out or 3 * self.hidden, self.hidden)
        yield from self.make(parent, last, self.hidden, self.hidden)

    def mlp(self, parent: str, first: str, last: str, width: int = 0, layers: Sequence[int] | None = None) -> Layers:
        """Into the MLP and out of it."""
        yield from self.make(parent, first, width or self.width, self.hidden, layers)
        yield from self.make(parent, last, self.hidden, width or self.width, layers)

    def experts(self, parent: str, width: int, layers: Sequence[int] | None = None, adapted: bool = False) -> Layers:
        """Stacked experts; adapted: all-linear reaches them and their router."""
        count = self["num_experts"]
        made = [
            *self.make(parent, "experts.gate_up_proj", 2 * width, self.hidden, layers),
            *self.make(parent, "experts.down_proj", self.hidden, width, layers),
        ]
        for found in made:
            yield found.model_copy(update={"stacked": count, "left_out": not adapted})
        for found in self.make(parent, "gate.weight", count, self.hidden, layers) if adapted else ():
            yield found.model_copy(update={"stacked": 1})


def _opt(s: _Sizes) -> Layers:
    yield from s.make("self_attn", "q_proj k_proj v_proj out_proj", s.hidden, s.hidden)
    yield from s.mlp("", "fc1", "fc2")
    if (narrow := s["word_embed_proj_dim"] or s.hidden) != s.hidden:
        yield LinearLayers(name="model.decoder.project_in", out=s.hidden, into=narrow, layers=[0])
        yield LinearLayers(name="model.decoder.project_out", out=narrow, into=s.hidden, layers=[0])


def _gpt2(s: _Sizes) -> Layers:
    yield from s.fused_attention("attn", "c_attn", "c_proj")
    yield from s.mlp("mlp", "c_fc", "c_proj")


def _gptj(s: _Sizes) -> Layers:
    yield from s.make("attn", "q_proj k_proj v_proj out_proj", s.hidden, s.hidden)
    yield from s.mlp("mlp", "fc_in", "fc_out")


def _gpt_neo(s: _Sizes) -> Layers:
    yield from s.make("attn.attention", "q_proj k_proj v_proj out_proj", s.hidden, s.hidden)
    yield from s.mlp("mlp", "c_fc", "c_proj")


def _neox(s: _Sizes) -> Layers:
    yield from s.fused_attention("attention", "query_key_value", "dense")
    yield from s.mlp("mlp", "dense_h_to_4h", "dense_4h_to_h")


def _bloom(s: _Sizes) -> Layers:
    yield from s.fused_attention("self_attention", "query_key_value", "dense")
    yield from s.mlp("mlp", "dense_h_to_4h", "dense_4h_to_h", 4 * s.hidden)


def _falcon(s: _Sizes) -> Layers:
    fused = 3 * s.hidden
    if s.config.get("new_decoder_architecture"):
        fused = (2 * size(s.config, "num_kv_heads", s.heads) + s.heads) * s.head
    elif s.config.get("multi_query", True):
        fused = s.hidden + 2 * s.head
    yield from s.fused_attention("self_attention", "query_key_value", "dense", fused)
    yield from s.mlp("mlp", "dense_h_to_4h", "dense_4h_to_h")


def _mpt(s: _Sizes) -> Layers:
    yield from s.fused_attention("attn", "Wqkv", "out_proj")
    yield from s.mlp("ffn", "up_proj", "down_proj", 4 * s.hidden)


def _phi(s: _Sizes) -> Layers:
    yield from s.attention(output="dense")
    yield from s.mlp("mlp", "fc1", "fc2")


def _glm4(s: _Sizes) -> Layers:
    yield from s.attention()
    yield from s.make("mlp", "gate_up_proj", 2 * s.width, s.hidden)
    yield from s.make("mlp", "down_proj", s.hidden, s.width)


def _nanochat(s: _Sizes) -> Layers:
    yield from s.attention()
    yield from s.mlp("mlp", "fc1", "fc2")


def _ungated(s: _Sizes) -> Layers:
    yield from s.attention()
    yield from s.mlp("mlp", "up_proj", "down_proj")


def _lfm2(s: _Sizes) -> Layers:
    kinds = s.config.get("layer_types") or ["full_attention"] * len(s.every)
    conv = [layer for layer in s.every if kinds[layer] == "conv"]
    yield from s.make("conv", "in_proj", 3 * s.hidden, s.hidden, conv)
    yield from s.make("conv", "out_proj", s.hidden, s.hidden, conv)
    yield from s.attention(output="out_proj", layers=[layer for layer in s.every if layer not in conv])
    width = s.width
    if s.config.get("block_auto_adjust_ff_dim", True):
        width = int(float(s.config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3))
        multiple = size(s.config, "block_multiple_of", 256)
        width = -(-width // multiple) * multiple
    yield from s.mlp("feed_forward", "w1 w3", "w2", width)


def _falcon_h1(s: _Sizes) -> Layers:
    yield from s.attention()
    yield from s.mlp("feed_forward", "gate_proj up_proj", "down_proj")
    inner = s["mamba_d_ssm"] or size(s.config, "mamba_expand", 2) * s.hidden
    states = 2 * size(s.config, "mamba_n_groups", 1) * size(s.config, "mamba_d_state", 256)
    yield from s.make("mamba", "in_proj", 2 * inner + states + size(s.config, "mamba_n_heads", 128), s.hidden)


def _gpt_oss(s: _Sizes) -> Layers:
    yield from s.attention()
    yield from s.experts("mlp", s.width)


def _granitemoe(s: _Sizes) -> Layers:
    yield from s.attention()
    yield from s.experts("block_sparse_moe", s.width)


def _qwen2_moe(s: _Sizes) -> Layers:
    step, dense_layers = size(s.config, "decoder_sparse_step", 1), s.config.get("mlp_only_layers") or []
    sparse = [layer for layer in s.every if layer not in dense_layers and (layer + 1) % step == 0]
    yield from s.attention()
    yield from s.mlp("mlp", "gate_proj up_proj", "down_proj", layers=[i for i in s.every if i not in sparse])
    yield from s.mlp(
        "mlp.shared_expert", "gate_proj up_proj", "down_proj", s["shared_expert_intermediate_size"], sparse
    )
    yield from s.make("mlp", "shared_expert_gate", 1, s.hidden, sparse)
    yield from s.experts("mlp", s["moe_intermediate_size"], sparse)


def _qwen3_next(s: _Sizes) -> Layers:
    kinds = s.config.get("layer_types") or []
    linear = [layer for layer in s.every if layer < len(kinds) and kinds[layer] == "linear_attention"]
    full = [layer for layer in s.every if layer not in linear]
    keys, values = (s[f"linear_{kind}_head_dim"] * s[f"linear_num_{kind}_heads"] for kind in ("key", "value"))
    yield from s.make("linear_attn", "in_proj_qkvz", 2 * keys + 2 * values, s.hidden, linear)
    yield from s.make("linear_attn", "in_proj_ba", 2 * s["linear_num_value_heads"], s.hidden, linear)
    yield from s.make("linear_attn", "out_proj", s.hidden, values, linear)
    yield from s.make("self_attn", "q_proj", 2 * s.queries, s.hidden, full)
    yield from s.make("self_attn", "k_proj v_proj", s.keys, s.hidden, full)
    yield from s.make("self_attn", "o_proj", s.hidden, s.queries, full)
    yield from s.make("mlp", "shared_expert_gate", 1, s.hidden)
    yield from s.experts("mlp", s["moe_intermediate_size"], adapted=True)


def _llama4(s: _Sizes) -> Layers:
    step = size(s.config, "interleave_moe_layer_step", 1)
    sparse = s.config.get("moe_layers") or list(range(step - 1, len(s.every), step))
    yield from s.attention()
    yield from s.mlp("feed_forward.shared_expert", "gate_proj up_proj", "down_proj", layers=sparse)
    dense = [layer for layer in s.every if layer not in sparse]
    yield from s.mlp("feed_forward", "gate_proj up_proj", "down_proj", s["intermediate_size_mlp"], dense)
    yield from s.experts("feed_forward", s.width, sparse)


def _deepseek(s: _Sizes) -> Layers:
    rope, plain, value = s["qk_rope_head_dim"], s["qk_nope_head_dim"], s["v_head_dim"]
    queries, low = s.heads * (rope + plain), s["q_lora_rank"]
    if low:
        yield from s.make("self_attn", "q_a_proj", low, s.hidden)
        yield from s.make("self_attn", "q_b_proj", queries, low)
    else:
        yield from s.make("self_attn", "q_proj", queries, s.hidden)
    yield from s.make("self_attn", "kv_a_proj_with_mqa", s["kv_lora_rank"] + rope, s.hidden)
    yield from s.make("self_attn", "kv_b_proj", s.heads * (plain + value), s["kv_lora_rank"])
    yield from s.make("self_attn", "o_proj", s.hidden, s.heads * value)
    yield from s.experts("mlp", s["moe_intermediate_size"], s.every[s["first_k_dense_replace"] :], adapted=True)


_LAYERS: dict[str, tuple[str, Callable[[_Sizes], Layers]]] = {
    "OPTForCausalLM": ("model.decoder.layers", _opt),
    "GPT2LMHeadModel": ("transformer.h", _gpt2),
    "GPTJForCausalLM": ("transformer.h", _gptj),
    "GPTNeoForCausalLM": ("transformer.h", _gpt_neo),
    "GPTNeoXForCausalLM": ("gpt_neox.layers", _neox),
    "BloomForCausalLM": ("transformer.h", _bloom),
    "FalconForCausalLM": ("transformer.h", _falcon),
    "MptForCausalLM": ("transformer.blocks", _mpt),
    "MPTForCausalLM": ("transformer.blocks", _mpt),
    "PhiForCausalLM": ("model.layers", _phi),
    "Glm4ForCausalLM": ("model.layers", _glm4),
    "NanoChatForCausalLM": ("model.layers", _nanochat),
    "ApertusForCausalLM": ("model.layers", _ungated),
    "NemotronForCausalLM": ("model.layers", _ungated),
    "Lfm2ForCausalLM": ("model.layers", _lfm2),
    "FalconH1ForCausalLM": ("model.layers", _falcon_h1),
    "GptOssForCausalLM": ("model.layers", _gpt_oss),
    "GraniteMoeForCausalLM": ("model.layers", _granitemoe),
    "Qwen2MoeForCausalLM": ("model.layers", _qwen2_moe),
    "Qwen3NextForCausalLM": ("model.layers", _qwen3_next),
    "Llama4ForCausalLM": ("model.layers", _llama4),
    "DeepseekV3ForCausalLM": ("model.layers", _deepseek),
}
"""Architectures whose layers are not named or sized like Llama's: what their layers' names begin with, and layers."""


def linear_layers(architecture: str, config: dict[str, Any]) -> list[LinearLayers]:
    """The linear layers of an architecture that is not like Llama; empty for one that is, or is not known.

    config: the text model's part of a config.json. Raises TypeError or ValueError for a damaged one.
    """
    if architecture not in _LAYERS:
        return []
    prefix, layers = _LAYERS[architecture]
    try:
        return list(layers(_Sizes(config, prefix)))
    except LookupError as error:
        raise ValueError(f"its layer_types name too few layers ({error})") from error
