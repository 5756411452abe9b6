"""Peak memory of one rank in training, in bytes, by component: the arithmetic behind the plan.

Nothing is measured here: every number follows from the tensors' shapes and from what autograd keeps, as the trainer
builds the model (trainer/finetune_trainer/model). tests/trainer/plan compares with real tensors and with torch's
memory tracker. Some moments can be the peak: the loss, the first layers of the backward pass (all activations are
still there), its last layer (the embedding is gathered again), its end (gradients of embedding and head are exchanged).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Literal

from finetune_api.patterns import NAMES, matches
from finetune_api.report import LinearLayers, MemoryComponent, ModelFacts
from finetune_api.spec import Lora, Tuning
from finetune_api.traits import Method, MethodTraits
from finetune_operator.sizing.gpus import GIB
from finetune_operator.sizing.model_shapes import Dims, Matrix, Shape

MIB = 1 << 20

LOGITS_PER_CHUNK = 1 << 25
"""Logits (positions times vocabulary) that exist at once (model/loss.py)."""
LOGITS_PER_BLOCK = 1 << 22
"""Those converted to float32 at a time, with as much again for their results (model/loss.py)."""
QUANTISED_BLOCK = 64
"""Weights that share one 4-bit quantisation constant; 256 constants share one of the second level."""
CUDA_CONTEXT_BYTES = 640 * MIB
"""CUDA context and workspaces of its libraries."""
NCCL_BYTES = 512 * MIB
"""Buffers of one communicator."""
FRAGMENTATION = 0.04
"""Share of the allocated memory that the caching allocator cannot use."""
PROCESS_BYTES = 768 * MIB
"""A CPU rank before it holds a model: interpreter, torch, gloo."""
HOST_PROCESS_BYTES = 3 * GIB
"""Host memory of a rank that computes on a GPU: interpreter, torch, CUDA libraries."""

Group = int
ROOT: Group = -1
"""Final norm, head, tied embeddings, soft prompts: gathered once per pass and kept to its end."""
EMBEDDING: Group = -2
"""Input embeddings of their own: gathered for the first operation only."""


@dataclass(frozen=True)
class Run:
    """What decides the memory of one rank, apart from the model."""

    tuning: Tuning
    compute_bytes: Literal[2, 4] = 2
    """Bytes of an element in matrix products: bf16 or fp32."""
    cuda: bool = True
    ranks: int = 1
    """The world size."""
    shard_ranks: int = 1
    """Ranks over which parameters are sharded: all, or those of a node."""
    checkpointing: bool = False
    compiled: bool = False
    accumulates: bool = False
    """More than one micro-batch per step."""
    labelled_share: float = 1.0
    """Share of the tokens in the loss."""
    longest: int = 1
    """Tokens of the longest document: an attention matrix is as wide, where one exists."""

    @property
    def method(self) -> MethodTraits:
        """How the model is tuned."""
        return self.tuning.method.traits

    @property
    def sharded(self) -> bool:
        """Whether FSDP is used: one rank alone holds plain tensors."""
        return self.ranks > 1

    @property
    def autocast(self) -> bool:
        """One rank alone computes in bf16 by autocast, which casts the input of each module anew."""
        return not self.sharded and self.compute_bytes == 2

    @property
    def fused(self) -> bool:
        """Whether the compiler sees through a whole layer: 4-bit products break its graph."""
        return self.compiled and not self.method.four_bit

    @property
    def trains_base(self) -> bool:
        """Whether the base model's own parameters are trained."""
        return self.method.trains_base


@dataclass(frozen=True)
class Tensor:
    """One parameter as a rank holds it at rest."""

    dims: Dims
    element_bytes: int
    group: Group
    trained: bool = False
    packed: bool = False
    """4-bit values, two per byte: never cast when gathered."""

    @property
    def elements(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.dims)

    def local_elements(self, ranks: int) -> int:
        """Elements that each rank holds: rows are shared out evenly, rounded up."""
        return ceil(self.dims[0] / ranks) * prod(self.dims[1:])


# --- which modules get adapters --------------------------------------------------------------------------------------


def _selects(lora: Lora, layer: int, matrix: Matrix) -> bool:
    """Whether LoRA adapts this matrix of this layer."""
    target = lora.target_modules
    if target == "all-linear":
        return True
    if NAMES.fullmatch(target):
        return matrix.leaf in {name.strip() for name in target.split(",")}
    return matches(target, f"model.layers.{layer}.{matrix.name}")


def adapted(shape: Shape, tuning: Tuning) -> dict[int, tuple[Matrix, ...]]:
    """The matrices of each layer that get a LoRA adapter; layers without any are left out."""
    if not tuning.method.traits.low_rank:
        return {}
    chosen = None if tuning.lora.layers is None else set(tuning.lora.layer_numbers or ())
    by_layer = {
        layer: tuple(matrix for matrix in shape.matrices if _selects(tuning.lora, layer, matrix))
        for layer in range(shape.facts.num_hidden_layers)
        if chosen is None or layer in chosen
    }
    return {layer: matrices for layer, matrices in by_layer.items() if matrices}


# --- the parameters --------------------------------------------------------------------------------------------------


def tensors(shape: Shape, run: Run) -> Iterator[Tensor]:
    """Every parameter of the model with its adapters, at rest: frozen ones in the products' type, trained in fp32."""
    facts, base = shape.facts, 4 if run.trains_base else run.compute_bytes
    embedding = ROOT if facts.tie_word_embeddings else EMBEDDING
    full = run.trains_base
    yield Tensor((facts.vocab_size, facts.hidden_size), base, embedding, full)
    if not facts.tie_word_embeddings:
        yield Tensor((facts.vocab_size, facts.hidden_size), base, ROOT, full)
    for dims in shape.final_norm:
        yield Tensor(dims, base, ROOT, full)
    for layer in range(facts.num_hidden_layers):
        for matrix in shape.matrices:
            if run.method.four_bit:
                yield Tensor((ceil(matrix.out * matrix.into / 2), 1), 1, layer, packed=True)
            else:
                yield Tensor((matrix.out, matrix.into), base, layer, full)
            if matrix.bias:
                yield Tensor((matrix.out,), base, layer, full)
        for dims in shape.others:
            yield Tensor(dims, base, layer, full)
    yield from _adapters(shape, run.tuning)


def _adapters(shape: Shape, tuning: Tuning) -> Iterator[Tensor]:
    facts, lora = shape.facts, tuning.lora
    if tuning.method.traits.low_rank and facts.linear_layers:
        yield from _for_named(facts, lora)
    else:
        for layer, matrices in adapted(shape, tuning).items():
            for matrix in matrices:
                yield from _low_rank(matrix.out, matrix.into, lora.rank, layer, lora.dora)
        for layer in range(facts.num_hidden_layers) if shape.family.experts else ():
            yield from _for_experts(shape, lora, layer)
    if tuning.method.traits.low_rank:
        yield from _beside_the_layers(shape, lora)
    elif tuning.method is Method.PROMPT:
        yield Tensor((tuning.prompt.virtual_tokens, facts.hidden_size), 4, ROOT, True)
    elif tuning.method is Method.PREFIX:
        width = 2 * facts.num_hidden_layers * facts.num_key_value_heads * facts.head_dim
        yield Tensor((tuning.prefix.virtual_tokens, width), 4, ROOT, True)


def _low_rank(out: int, into: int, rank: int, group: Group, dora: bool = False) -> Iterator[Tensor]:
    yield Tensor((rank, into), 4, group, True)
    yield Tensor((out, rank), 4, group, True)
    if dora:
        yield Tensor((out,), 4, group, True)


def _for_named(facts: ModelFacts, lora: Lora) -> Iterator[Tensor]:
    """Adapters of an architecture whose linear layers are listed: PEFT gives each stacked matrix a rank of its own."""
    chosen, everything = lora.layer_numbers, lora.target_modules == "all-linear"
    for linear in facts.linear_layers:
        leaf = linear.name.removesuffix(".weight").rpartition(".")[2]
        twice = everything and linear.stacked and leaf == "gate_up_proj"  # the ranks of gate and up, which are one
        rank = lora.rank * max(1, linear.stacked) * (2 if twice else 1)
        for layer in linear.layers or range(facts.num_hidden_layers):
            if (chosen is None or ("*" in linear.name and layer in chosen)) and _reaches(lora, linear, leaf, layer):
                yield from _low_rank(linear.out, linear.into, rank, layer, lora.dora)


def _reaches(lora: Lora, linear: LinearLayers, leaf: str, layer: int) -> bool:
    """Whether LoRA adapts it in this layer, if it adapts the layer at all."""
    if lora.target_modules == "all-linear":
        router = linear.stacked == 1  # which PEFT finds only where it resolves all-linear itself
        return not linear.left_out and not (router and lora.layers is not None)
    if NAMES.fullmatch(lora.target_modules):
        return leaf in {name.strip() for name in lora.target_modules.split(",")}
    return matches(lora.target_modules, linear.name.replace("*", str(layer)))


def _for_experts(shape: Shape, lora: Lora, layer: int) -> Iterator[Tensor]:
    """PEFT's adapters of a mixture, a rank for each expert; all-linear takes the router too, and gate and up as two."""
    experts, hidden, width = shape.facts.num_experts, shape.facts.hidden_size, shape.expert_width
    if lora.target_modules == "all-linear":
        if lora.layers is None:
            yield from _low_rank(experts, hidden, lora.rank, layer)
            yield from _low_rank(2 * width, hidden, 2 * lora.rank * experts, layer)
            yield from _low_rank(hidden, width, lora.rank * experts, layer)
        return
    if lora.layer_numbers is not None and layer not in lora.layer_numbers:
        return
    for name, out, into in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        if _selects(lora, layer, Matrix(f"mlp.experts.{name}", out, into)):
            yield from _low_rank(out, into, lora.rank * experts, layer)


def _beside_the_layers(shape: Shape, lora: Lora) -> Iterator[Tensor]:
    """Adapters of embedding and head that are named, and modules that are trained whole."""
    facts = shape.facts
    size = facts.vocab_size, facts.hidden_size
    names = {name.strip() for name in lora.target_modules.split(",")}
    groups = {"embed_tokens": ROOT if facts.tie_word_embeddings else EMBEDDING, "lm_head": ROOT}
    for name, group in groups.items():
        if name in names:
            out, into = size if name == "lm_head" else (facts.hidden_size, facts.vocab_size)
            yield from _low_rank(out, into, lora.rank, group, lora.dora)
        if name in lora.modules_to_save:
            yield Tensor(size, 4, group, True)
    for matrix in shape.matrices:
        if matrix.leaf in lora.modules_to_save:
            for layer in range(facts.num_hidden_layers):
                yield Tensor((matrix.out, matrix.into), 4, layer, True)


def constants_bytes(shape: Shape, tuning: Tuning) -> int:
    """QLoRA's quantisation constants, whole on every rank (https://arxiv.org/abs/2305.14314, section 3)."""
    if not tuning.method.traits.four_bit:
        return 0
    total = 0
    for matrix in shape.matrices:
        blocks = ceil(matrix.out * matrix.into / QUANTISED_BLOCK)
        codebook = 16 * 4
        if tuning.quantization.double_quant:
            total += blocks + 4 * ceil(blocks / 256) + 256 * 4 + 4 + codebook
        else:
            total += 4 * blocks + codebook
    return total * shape.facts.num_hidden_layers


# --- what autograd keeps ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """Bytes per token that one layer keeps for the backward pass."""

    shape: Shape
    run: Run
    matrices: tuple[Matrix, ...]
    """Those with an adapter."""

    @property
    def bytes_per_token(self) -> int:
        return self._norms + self._inputs + self._attention + self._mlp + self._adapter

    @property
    def _element(self) -> int:
        return self.run.compute_bytes

    @property
    def _residual(self) -> int:
        """Bytes of an element of the residual stream: under autocast of fp32 weights it stays fp32."""
        return 4 if self.run.autocast and self.run.trains_base else self._element

    @property
    def _norms(self) -> int:
        """A norm keeps its input in float32, and its output before the weight if the weight is trained.

        Compiled it keeps the residual stream as it is and computes the rest again.
        """
        facts, family = self.shape.facts, self.shape.family
        queries = facts.num_attention_heads * facts.head_dim
        keys = facts.num_key_value_heads * facts.head_dim
        width = family.norms * facts.hidden_size + (queries + keys if family.qk_norm else 0)
        if self.run.compiled:
            return self._residual * width
        return (4 + (self._residual if self.run.trains_base else 0)) * width

    @property
    def _inputs(self) -> int:
        """Inputs of the linear layers whose weight or adapter is trained."""
        total = 0
        for members in _sharing_an_input(self.shape):
            trained = members if self.run.trains_base else [m for m in members if m in self.matrices]
            if trained:
                total += self._kept_input(trained)
        return total

    def _kept_input(self, trained: list[Matrix]) -> int:
        width = trained[0].into
        is_output = trained[0].name.startswith("self_attn.") and width != self.shape.facts.hidden_size
        is_output = is_output or trained[0].leaf == self.shape.family.o_name
        dropout = self.run.tuning.lora.dropout > 0 and not self.run.trains_base
        if dropout:  # what is left of it, and where: a byte on CUDA
            return len(trained) * (self._element + (1 if self.run.cuda else self._element)) * width
        if self.run.autocast and not self.run.fused and not self._plain_lora:
            return len(trained) * self._element * width
        return 0 if is_output else self._element * width

    @property
    def _plain_lora(self) -> bool:
        """The trainer's own layer takes its input as it is; PEFT's others copy it."""
        return self.run.method.low_rank and not self.run.method.four_bit and not self.run.tuning.lora.dora

    @property
    def _attention(self) -> int:
        """Queries, keys and values, the output, the softmax's normaliser.

        On a GPU, or with masks, keys and values are repeated to the number of queries.
        """
        facts = self.shape.facts
        repeated = self.run.cuda or self.shape.family.masked
        key_heads = facts.num_attention_heads if repeated else facts.num_key_value_heads
        heads = 2 * facts.num_attention_heads + 2 * key_heads
        kept = self._element * heads * facts.head_dim + 4 * facts.num_attention_heads
        if self.shape.family.masked:  # scores before and after the cap, and their softmax in float32 and back
            kept += (3 * self._element + 4) * facts.num_attention_heads * self.run.longest
        return kept

    @property
    def _mlp(self) -> int:
        """Gate, its activation and up; compiled, the activation is computed again."""
        facts, family = self.shape.facts, self.shape.family
        if family.experts:
            chosen = facts.experts_per_token or 2
            return chosen * self._element * (4 * self.shape.expert_width + 2 * facts.hidden_size)
        kept = 2 if self.run.fused else 3
        return self._element * facts.intermediate_size * (kept if family.gated else 1)

    @property
    def _adapter(self) -> int:
        """A's output; DoRA also keeps the outputs of base and adapter."""
        lora = self.run.tuning.lora
        total = sum(self._element * lora.rank for _ in self.matrices)
        if lora.dora:
            total += sum(2 * self._element * matrix.out for matrix in self.matrices)
        return total


def _sharing_an_input(shape: Shape) -> list[list[Matrix]]:
    """The linear layers by what they read: the first norm's output, the attention's, the second's, the MLP's."""
    family = shape.family
    first = [m for m in shape.matrices if m.name.startswith("self_attn.") and m.leaf != family.o_name]
    output = [m for m in shape.matrices if m.name.startswith("self_attn.") and m.leaf == family.o_name]
    mlp = [m for m in shape.matrices if m.name.startswith("mlp.")]
    return [group for group in (first, output, mlp[:-1], mlp[-1:]) if group]


# --- the peak --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Peak memory of one rank of a run."""

    shape: Shape
    run: Run

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensors(self.shape, self.run))

    @cached_property
    def trained_parameters(self) -> int:
        """Parameters that are trained, over all ranks."""
        return sum(tensor.elements for tensor in self._tensors if tensor.trained)

    def _local(self, tensor: Tensor) -> int:
        return tensor.local_elements(self.run.shard_ranks)

    @cached_property
    def weights(self) -> int:
        """The base model's parameters."""
        frozen = (t for t in self._tensors if self.run.trains_base or not t.trained)
        return sum(self._local(tensor) * tensor.element_bytes for tensor in frozen)

    @cached_property
    def adapters(self) -> int:
        """Parameters trained in addition to the base model."""
        if self.run.trains_base:
            return 0
        return sum(self._local(tensor) * tensor.element_bytes for tensor in self._tensors if tensor.trained)

    @cached_property
    def _trained_local(self) -> int:
        return sum(self._local(tensor) for tensor in self._tensors if tensor.trained)

    @cached_property
    def gradients(self) -> int:
        """In float32. Adapters' are whole on every rank until the last micro-batch of a step exchanges them."""
        whole = self.run.accumulates and self.run.sharded and not self.run.trains_base
        return 4 * (self._trained_local + (self.trained_parameters if whole else 0))

    @cached_property
    def optimizer(self) -> int:
        """AdamW's two moments, and one counter per tensor."""
        return 8 * self._trained_local + 4 * sum(tensor.trained for tensor in self._tensors)

    @cached_property
    def constants(self) -> int:
        """Quantisation constants."""
        return constants_bytes(self.shape, self.run.tuning)

    def _gathered(self, group: Group) -> int:
        """Bytes of one group's parameters, whole, in the type of the products."""
        return sum(
            tensor.elements * (1 if tensor.packed else self.run.compute_bytes)
            for tensor in self._tensors
            if tensor.group == group
        )

    @cached_property
    def _largest_layer(self) -> int:
        return max(self._gathered(layer) for layer in range(self.shape.facts.num_hidden_layers))

    @cached_property
    def _casts(self) -> int:
        """What autocast keeps of weights that are not in its type: of one rank alone."""
        cast = 0
        if self.run.autocast:
            cast = sum(2 * t.elements for t in self._tensors if t.trained and len(t.dims) > 1)
        return cast

    @cached_property
    def _adapted(self) -> dict[int, tuple[Matrix, ...]]:
        return adapted(self.shape, self.run.tuning)

    def _layer_bytes(self, layer: int, checkpointing: bool) -> int:
        if checkpointing:
            return self.run.compute_bytes * self.shape.facts.hidden_size
        return _Layer(self.shape, self.run, self._adapted.get(layer, ())).bytes_per_token

    @cached_property
    def layers_with_backward(self) -> range:
        """The layers that a backward pass goes through: none below the lowest that is trained."""
        count = self.shape.facts.num_hidden_layers
        if self.run.method.low_rank:
            below = any(t.trained and t.group in (EMBEDDING, ROOT) for t in self._tensors)
            embeds = "embed_tokens" in self.run.tuning.lora.target_modules + str(self.run.tuning.lora.modules_to_save)
            lowest = 0 if below and embeds else min(self._adapted, default=count)
            return range(lowest, count)
        return range(count)

    def activations(self, tokens: int) -> int:
        """What autograd keeps at the end of the forward pass."""
        facts, run = self.shape.facts, self.run
        final_norm = (4 + (run.compute_bytes if run.trains_base else 0)) * facts.hidden_size
        labelled = ceil(tokens * run.labelled_share) * run.compute_bytes * facts.hidden_size
        return self._in_layers(tokens) + tokens * final_norm + labelled

    def _in_layers(self, tokens: int) -> int:
        """What the layers keep: with recomputation the input of each."""
        return tokens * sum(self._layer_bytes(layer, self.run.checkpointing) for layer in self.layers_with_backward)

    @cached_property
    def _one_layer(self) -> int:
        """Bytes per token of the layer that keeps the most."""
        return max((self._layer_bytes(layer, False) for layer in self.layers_with_backward), default=0)

    def _logits(self, tokens: int) -> tuple[int, int]:
        """Bytes of the logits of one chunk, and the number of chunks."""
        labelled = max(1, ceil(tokens * self.run.labelled_share))
        vocabulary = self.shape.facts.vocab_size
        chunk = max(1, LOGITS_PER_CHUNK // vocabulary)
        # The logits and their gradient, in the type of the products; a cap keeps what it was given, too.
        tensors = 3 if self.shape.family.capped_logits else 2
        logits = vocabulary * min(chunk, labelled)
        kept = tensors * self.run.compute_bytes * logits
        return kept + 8 * min(logits, LOGITS_PER_BLOCK), ceil(labelled / chunk)

    def _trains_head(self) -> bool:
        return self.run.trains_base or "lm_head" in self.run.tuning.lora.modules_to_save

    def _moments(self, tokens: int) -> list[list[tuple[str, int]]]:
        """The components of each moment that may be the peak, on top of what is always there."""
        facts, run = self.shape.facts, self.run
        activations = self.activations(tokens)
        logits, chunks = self._logits(tokens)
        root = self._gathered(ROOT) if run.sharded else 0
        head = run.compute_bytes * facts.vocab_size * facts.hidden_size
        head_gradient = head if self._trains_head() else 0
        # The chunks' contributions to the head's gradient are added out of place.
        at_the_loss = max(logits + 2 * head_gradient, 3 * head_gradient) if chunks > 1 else logits + head_gradient
        layer, embedded = (self._largest_layer, self._gathered(EMBEDDING)) if run.sharded else (0, 0)
        in_a_layer = [
            ("gradients being reduced", self._in_backward(tokens) + (head_gradient if run.sharded else 0)),
            ("dequantised weights", self._dequantised),
        ]
        computed_again = tokens * self._one_layer if run.checkpointing else 0
        in_layers = self._in_layers(tokens) + computed_again
        moments = [
            [("activations", activations), ("logits (one chunk)", at_the_loss), ("all-gathered layers", root)],
            [("activations", in_layers), ("all-gathered layers", root + 2 * layer), *in_a_layer],
        ]
        if embedded:
            first = tokens * (self._one_layer + run.compute_bytes * facts.hidden_size)
            moments.append([("activations", first), ("all-gathered layers", root + layer + embedded), *in_a_layer])
            moments.append([("all-gathered layers", root + 2 * embedded)])
        if run.sharded and run.trains_base:
            embedding = 0 if facts.tie_word_embeddings else head
            exchanged = 4 * facts.vocab_size * facts.hidden_size
            share = ceil(exchanged / run.shard_ranks)
            way = ("gradients being reduced", head + embedding + exchanged + share)
            moments.append([way, ("all-gathered layers", root)])
        return moments

    def _in_backward(self, tokens: int) -> int:
        """Gradients of activations of one MLP, and of one layer's parameters until they are exchanged."""
        facts, run = self.shape.facts, self.run
        width = facts.intermediate_size if not self.shape.family.experts else self.shape.expert_width * 2
        down = self.shape.matrices[-1]
        kept_its_input = run.trains_base or any(down in matrices for matrices in self._adapted.values())
        # Three of the MLP's width; the last layer's own input is let go before they are there.
        flowing = run.compute_bytes * tokens * ((2 if kept_its_input else 3) * width + facts.hidden_size)
        if run.trains_base and run.sharded:
            flowing += (run.compute_bytes + 4) * self.shape.layer_parameters
        return flowing

    @cached_property
    def _dequantised(self) -> int:
        """The largest matrix in the type of the products, for its own multiplication; DoRA takes its norm as well."""
        run = self.run
        largest = max((m.out * m.into for m in self.shape.matrices), default=0)
        total = run.compute_bytes * largest if run.method.four_bit else 0
        if run.tuning.lora.dora and self._adapted:
            widest = max(m.into for matrices in self._adapted.values() for m in matrices)
            total += run.compute_bytes * (widest**2 + 3 * largest)
        return total

    def components(self, tokens: int) -> list[MemoryComponent]:
        """Peak memory of a rank whose largest micro-batch has `tokens` tokens, by component; they add up to it."""
        lasting = [
            ("weights", self.weights),
            ("quantisation constants", self.constants),
            ("adapters", self.adapters),
            ("bf16 copies of weights", self._casts),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
        ]
        peak = max(self._moments(tokens), key=lambda moment: sum(size for _, size in moment))
        allocated = [*lasting, *peak]
        around = self._around(sum(size for _, size in allocated))
        return [MemoryComponent(name=name, bytes=size) for name, size in (*allocated, *around) if size]

    def _around(self, allocated: int) -> list[tuple[str, int]]:
        if not self.run.cuda:
            return [("process", PROCESS_BYTES)]
        communicators = (self.run.ranks > 1) + (1 < self.run.shard_ranks < self.run.ranks)
        return [
            ("CUDA and NCCL", CUDA_CONTEXT_BYTES + communicators * NCCL_BYTES),
            ("fragmentation", int(FRAGMENTATION * allocated)),
        ]

    def total(self, tokens: int) -> int:
        """Peak memory of a rank in bytes."""
        return sum(component.bytes for component in self.components(tokens))

    def host(self, tokens: int, ranks_per_node: int) -> int:
        """Host memory per node: its processes, the largest tensor while loading, a copy of what is being saved.

        A checkpoint copies the rank's share of trained parameters and moments before it is written.
        """
        largest = max(tensor.elements * 4 for tensor in self._tensors)
        saved = 12 * self._trained_local
        rank = HOST_PROCESS_BYTES if self.run.cuda else self.total(tokens)
        return ranks_per_node * (rank + max(largest, saved))
