"""Shapes of language models: every tensor of a model from its config, without torch.

`model_facts` reads a `config.json`; `shape_of` lists the matrices and vectors of a layer as transformers names
them. Architectures in `FAMILIES` are exact (tests build each with transformers and compare); any other is assumed
to be like Llama, and `Shape.known` is False.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from finetune_api.architectures import linear_layers, size
from finetune_api.report import ModelFacts

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """How the layers of an architecture differ from Llama's."""

    norms: int = 2
    """Norms of the width of the residual stream in a layer."""
    qkv_bias: bool | None = None
    """None: as `attention_bias` of the config says."""
    o_bias: bool | None = None
    qk_norm: Literal["", "head", "width"] = ""
    """Norms on queries and keys: of a head's width, or of all heads'."""
    fused: bool = False
    """One matrix for q, k, v and one for gate and up."""
    gated: bool = True
    mlp_bias: bool = False
    norm_bias: bool = False
    mlp_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    o_name: str = "o_proj"
    final_norm_bias: bool = False
    experts: bool = False
    """The MLP is a mixture of experts, stored as stacked tensors that no adapter reaches."""
    masked: bool = False
    """Its attention needs a dense mask and materialised scores."""
    capped_logits: bool = False
    """Its head ends with a cap (tanh)."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False),
    "SmolLM3ForCausalLM": Family(),
    "GraniteForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False),
    "Qwen3ForCausalLM": Family(qk_norm="head"),
    "Olmo2ForCausalLM": Family(qk_norm="width"),
    "GemmaForCausalLM": Family(),
    "Gemma2ForCausalLM": Family(norms=4, masked=True, capped_logits=True),
    "Gemma3ForCausalLM": Family(norms=4, qk_norm="head"),
    "Phi3ForCausalLM": Family(qkv_bias=False, o_bias=False, fused=True),
    "Starcoder2ForCausalLM": Family(
        qkv_bias=True,
        o_bias=True,
        gated=False,
        mlp_bias=True,
        norm_bias=True,
        mlp_names=("c_fc", "c_proj"),
        final_norm_bias=True,
    ),
    "MixtralForCausalLM": Family(qkv_bias=False, o_bias=False, experts=True),
    "Qwen3MoeForCausalLM": Family(qk_norm="head", experts=True),
}


@dataclass(frozen=True)
class Matrix:
    """A linear layer: `out` rows of `into` columns, and its name within the decoder layer."""

    name: str
    out: int
    into: int
    bias: bool = False

    @property
    def leaf(self) -> str:
        """Last part of the name: `q_proj`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Shape:
    """A whole model."""

    facts: ModelFacts
    family: Family
    known: bool
    """Whether the architecture is in FAMILIES."""
    matrices: tuple[Matrix, ...]
    """Linear layers of each decoder layer."""
    others: tuple[Dims, ...]
    """Other parameters of each decoder layer: norms, stacked experts, a router."""
    expert_width: int = 0
    """Width of one expert's MLP."""

    @property
    def final_norm(self) -> tuple[Dims, ...]:
        """Parameters of the norm before the head."""
        size = (self.facts.hidden_size,)
        return (size, size) if self.family.final_norm_bias else (size,)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        linear = sum(matrix.out * (matrix.into + matrix.bias) for matrix in self.matrices)
        return linear + sum(prod(dims) for dims in self.others)

    @property
    def parameters(self) -> int:
        """Parameters in all, a tied head once."""
        facts = self.facts
        embedding = facts.vocab_size * facts.hidden_size
        heads = 1 if facts.tie_word_embeddings else 2
        norm = sum(prod(dims) for dims in self.final_norm)
        return heads * embedding + norm + facts.num_hidden_layers * self.layer_parameters

    @property
    def active_parameters(self) -> int:
        """Matrix elements that one token goes through in a forward pass, embedding and head left out."""
        facts = self.facts
        linear = sum(matrix.out * matrix.into for matrix in self.matrices)
        used = (facts.experts_per_token or 2) if self.family.experts else 0
        return facts.num_hidden_layers * (linear + used * 3 * self.expert_width * facts.hidden_size)


def shape_of(facts: ModelFacts) -> Shape:
    """The tensors of the model that `facts` describe."""
    family = FAMILIES.get(facts.architecture)
    known = family is not None
    if family is None:
        family = Family(experts=facts.num_experts > 1)
    elif family.experts and facts.num_experts <= 1:
        family = Family(qk_norm=family.qk_norm)
    matrices = (*_attention(facts, family), *_mlp(facts, family))
    shape = Shape(facts, family, known, matrices, _vectors(facts, family))
    if not family.experts:
        return shape
    width = _expert_width(shape)
    experts, hidden = facts.num_experts, facts.hidden_size
    stacked = ((experts, 2 * width, hidden), (experts, hidden, width), (experts, hidden))
    return Shape(facts, family, known, matrices, (*shape.others, *stacked), width)


def _attention(facts: ModelFacts, family: Family) -> tuple[Matrix, ...]:
    hidden = facts.hidden_size
    queries, keys = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    qkv_bias = facts.attention_bias if family.qkv_bias is None else family.qkv_bias
    o_bias = facts.attention_bias if family.o_bias is None else family.o_bias
    output = Matrix(f"self_attn.{family.o_name}", hidden, queries, o_bias)
    if family.fused:
        return Matrix("self_attn.qkv_proj", queries + 2 * keys, hidden, qkv_bias), output
    return (
        Matrix("self_attn.q_proj", queries, hidden, qkv_bias),
        Matrix("self_attn.k_proj", keys, hidden, qkv_bias),
        Matrix("self_attn.v_proj", keys, hidden, qkv_bias),
        output,
    )


def _mlp(facts: ModelFacts, family: Family) -> tuple[Matrix, ...]:
    hidden, width = facts.hidden_size, facts.intermediate_size
    if family.experts:
        return ()
    if family.fused:
        return Matrix("mlp.gate_up_proj", 2 * width, hidden), Matrix("mlp.down_proj", hidden, width)
    *first, last = family.mlp_names
    bias = family.mlp_bias
    return (*(Matrix(f"mlp.{name}", width, hidden, bias) for name in first), Matrix(f"mlp.{last}", hidden, width, bias))


def _vectors(facts: ModelFacts, family: Family) -> tuple[Dims, ...]:
    """Norms of a layer."""
    hidden: Dims = (facts.hidden_size,)
    norms = [hidden] * family.norms * (2 if family.norm_bias else 1)
    if family.qk_norm == "head":
        norms += [(facts.head_dim,)] * 2
    elif family.qk_norm == "width":
        norms += [(facts.num_attention_heads * facts.head_dim,), (facts.num_key_value_heads * facts.head_dim,)]
    return tuple(norms)


def _expert_width(shape: Shape) -> int:
    """Width of an expert, from the number of parameters: configs call it by many names."""
    facts = shape.facts
    per_layer = (facts.parameters - shape.parameters) / facts.num_hidden_layers
    router = facts.num_experts * facts.hidden_size
    return max(1, round((per_layer - router) / (3 * facts.num_experts * facts.hidden_size)))


# --- from a config.json ----------------------------------------------------------------------------------------------


class UnknownShapeError(ValueError):
    """A config without a size that the shape needs."""


_TIED_BY_DEFAULT = (
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Starcoder2ForCausalLM", "CohereForCausalLM"),
    *("GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "FalconForCausalLM"),
    *("MptForCausalLM", "MPTForCausalLM", "Cohere2ForCausalLM", "Lfm2ForCausalLM"),
)


def model_facts(config: dict[str, Any], parameters: int | None = None) -> ModelFacts:
    """The facts in a `config.json`; parameters are counted from the shape unless given.

    Raises UnknownShapeError (a sentence) for a config without the sizes of a decoder.
    """
    text = config.get("text_config", config)
    names = [config.get("architectures"), text.get("architectures"), ["unknown"]]
    architecture = next(name for found in names if found for name in found)
    for name in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size"):
        if not size(text, name):
            raise UnknownShapeError(f"its config.json has no {name}")
    heads, hidden = size(text, "num_attention_heads"), size(text, "hidden_size")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", architecture in _TIED_BY_DEFAULT))
    facts = ModelFacts(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=size(text, "intermediate_size", 4 * hidden),
        num_hidden_layers=size(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size(text, "num_key_value_heads", heads),
        head_dim=size(text, "head_dim", hidden // heads),
        vocab_size=size(text, "vocab_size"),
        tie_word_embeddings=bool(tied),
        attention_bias=bool(text.get("attention_bias", False)),
        max_position_embeddings=size(text, "max_position_embeddings"),
        parameters=parameters or 0,
        num_experts=size(text, "num_experts"),
        experts_per_token=size(text, "num_experts_per_tok"),
        linear_layers=linear_layers(architecture, text),
    )
    if parameters is None:
        facts.parameters = _count(facts, int(text.get("moe_intermediate_size") or facts.intermediate_size))
    return facts


def _count(facts: ModelFacts, expert_width: int) -> int:
    if facts.num_experts <= 1:
        return shape_of(facts).parameters
    without = shape_of(facts.model_copy(update={"parameters": 0}))
    dense = Shape(facts, without.family, without.known, without.matrices, without.others[:-3]).parameters
    per_layer = facts.num_experts * facts.hidden_size * (3 * expert_width + 1)
    return dense + facts.num_hidden_layers * per_layer


# --- models known by name --------------------------------------------------------------------------------------------

_LLAMA, _MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
_QWEN2, _QWEN3, _GEMMA2, _PHI3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"

# name: architecture, hidden, intermediate, layers, heads, key-value heads, head width, vocabulary, tied, context
_KNOWN: dict[str, tuple[str, int, int, int, int, int, int, int, bool, int]] = {
    "meta-llama-3-8b": (_LLAMA, 4096, 14336, 32, 32, 8, 128, 128256, False, 8192),
    "meta-llama-3-70b": (_LLAMA, 8192, 28672, 80, 64, 8, 128, 128256, False, 8192),
    "llama-3.1-8b": (_LLAMA, 4096, 14336, 32, 32, 8, 128, 128256, False, 131072),
    "llama-3.1-70b": (_LLAMA, 8192, 28672, 80, 64, 8, 128, 128256, False, 131072),
    "llama-3.1-405b": (_LLAMA, 16384, 53248, 126, 128, 8, 128, 128256, False, 131072),
    "llama-3.2-1b": (_LLAMA, 2048, 8192, 16, 32, 8, 64, 128256, True, 131072),
    "llama-3.2-3b": (_LLAMA, 3072, 8192, 28, 24, 8, 128, 128256, True, 131072),
    "llama-3.3-70b": (_LLAMA, 8192, 28672, 80, 64, 8, 128, 128256, False, 131072),
    "tinyllama-1.1b-chat-v1.0": (_LLAMA, 2048, 5632, 22, 32, 4, 64, 32000, False, 2048),
    "smollm2-135m": (_LLAMA, 576, 1536, 30, 9, 3, 64, 49152, True, 8192),
    "smollm2-360m": (_LLAMA, 960, 2560, 32, 15, 5, 64, 49152, True, 8192),
    "smollm2-1.7b": (_LLAMA, 2048, 8192, 24, 32, 32, 64, 49152, True, 8192),
    "mistral-7b-v0.1": (_MISTRAL, 4096, 14336, 32, 32, 8, 128, 32000, False, 32768),
    "mistral-7b-v0.2": (_MISTRAL, 4096, 14336, 32, 32, 8, 128, 32000, False, 32768),
    "mistral-7b-v0.3": (_MISTRAL, 4096, 14336, 32, 32, 8, 128, 32768, False, 32768),
    "mistral-nemo-base-2407": (_MISTRAL, 5120, 14336, 40, 32, 8, 128, 131072, False, 131072),
    "mistral-nemo-2407": (_MISTRAL, 5120, 14336, 40, 32, 8, 128, 131072, False, 131072),
    "qwen2.5-0.5b": (_QWEN2, 896, 4864, 24, 14, 2, 64, 151936, True, 32768),
    "qwen2.5-1.5b": (_QWEN2, 1536, 8960, 28, 12, 2, 128, 151936, True, 32768),
    "qwen2.5-3b": (_QWEN2, 2048, 11008, 36, 16, 2, 128, 151936, True, 32768),
    "qwen2.5-7b": (_QWEN2, 3584, 18944, 28, 28, 4, 128, 152064, False, 32768),
    "qwen2.5-14b": (_QWEN2, 5120, 13824, 48, 40, 8, 128, 152064, False, 32768),
    "qwen2.5-32b": (_QWEN2, 5120, 27648, 64, 40, 8, 128, 152064, False, 32768),
    "qwen2.5-72b": (_QWEN2, 8192, 29568, 80, 64, 8, 128, 152064, False, 32768),
    "qwen3-0.6b": (_QWEN3, 1024, 3072, 28, 16, 8, 128, 151936, True, 40960),
    "qwen3-1.7b": (_QWEN3, 2048, 6144, 28, 16, 8, 128, 151936, True, 40960),
    "qwen3-4b": (_QWEN3, 2560, 9728, 36, 32, 8, 128, 151936, True, 40960),
    "qwen3-8b": (_QWEN3, 4096, 12288, 36, 32, 8, 128, 151936, False, 40960),
    "qwen3-14b": (_QWEN3, 5120, 17408, 40, 40, 8, 128, 151936, False, 40960),
    "qwen3-32b": (_QWEN3, 5120, 25600, 64, 64, 8, 128, 151936, False, 40960),
    "gemma-2-2b": (_GEMMA2, 2304, 9216, 26, 8, 4, 256, 256000, True, 8192),
    "gemma-2-9b": (_GEMMA2, 3584, 14336, 42, 16, 8, 256, 256000, True, 8192),
    "gemma-2-27b": (_GEMMA2, 4608, 36864, 46, 32, 16, 128, 256000, True, 8192),
    "phi-3-mini-4k": (_PHI3, 3072, 8192, 32, 32, 32, 96, 32064, False, 4096),
    "phi-4": (_PHI3, 5120, 17920, 40, 40, 10, 128, 100352, False, 16384),
}
_ENDINGS = ("-instruct", "-base", "-it", "-hf", "-chat", "-pt")


def known_model(repo: str) -> ModelFacts | None:
    """The shape of a common model by its repository's name, whoever uploaded it; None where it is not known."""
    name = repo.rpartition("/")[2].lower()
    for form in _forms(name):
        if form in _KNOWN:
            architecture, hidden, width, layers, heads, kv_heads, head_dim, vocabulary, tied, context = _KNOWN[form]
            config = {
                "architectures": [architecture],
                "hidden_size": hidden,
                "intermediate_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": head_dim,
                "vocab_size": vocabulary,
                "tie_word_embeddings": tied,
                "max_position_embeddings": context,
            }
            return model_facts(config)
    return None


def _forms(name: str) -> list[str]:
    """The name, and the same without `-Instruct` and other endings, with and without Meta's prefix."""
    forms = [name]
    for ending in _ENDINGS:
        forms += [form.replace(ending, "", 1) for form in forms if ending in form]
    forms += [form.removeprefix("meta-") for form in forms] + [f"meta-{form}" for form in forms]
    return forms
