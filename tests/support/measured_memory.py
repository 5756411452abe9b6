"""The trainer's model built without files and without memory, and what it really holds: the plan's yardstick."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from finetune_api.spec import Tuning
from finetune_api.traits import Method
from finetune_operator.sizing.memory import Memory, Run
from finetune_operator.sizing.model_shapes import model_facts, shape_of
from finetune_trainer.data.packing import Batch
from finetune_trainer.model import adapters, build, nf4
from finetune_trainer.model.attention import DOCUMENTS
from finetune_trainer.model.sharding import shard
from finetune_trainer.model.weights import empty_model
from finetune_trainer.train.optimizer import Optimizer

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def llama_3_8b(layers: int = 32, **changes: Any) -> LlamaConfig:
    """Llama-3-8B, with fewer layers if asked."""
    return LlamaConfig(**(LLAMA_3_8B | {"num_hidden_layers": layers, "tie_word_embeddings": False} | changes))


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    config: PretrainedConfig
    tuning: Tuning
    ranks: int = 4
    bf16: bool = True
    checkpointing: bool = False
    compiled: bool = False
    tokens: int = 512
    document: int = 128
    labelled: int | None = None

    @property
    def precision(self) -> torch.dtype:
        """Type of frozen weights and of products."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def planned(self) -> Memory:
        """The plan's arithmetic for it, on a CPU."""
        run = Run(
            tuning=self.tuning,
            compute_bytes=2 if self.bf16 else 4,
            cuda=False,
            ranks=self.ranks,
            shard_ranks=self.ranks,
            checkpointing=self.checkpointing,
            compiled=self.compiled,
            labelled_share=(self.labelled or self.tokens) / self.tokens,
            longest=self.document,
        )
        return Memory(shape_of(model_facts(config_json(self.config))), run)

    def batch(self) -> Batch:
        """A packed row of equal documents."""
        tokens, labelled = self.tokens, self.labelled or self.tokens
        at = torch.arange(tokens)
        return Batch(
            ids=torch.zeros(1, tokens, dtype=torch.int64),
            positions=at[None] % self.document,
            cu_seqlens=torch.arange(0, tokens + 1, self.document, dtype=torch.int32),
            bounds=tuple(range(0, tokens + 1, self.document)),
            max_length=self.document,
            target_position=torch.arange(labelled),
            target_id=torch.zeros(labelled, dtype=torch.int64),
            target_weight=torch.ones(labelled),
            target_document=torch.zeros(labelled, dtype=torch.int64),
        )

    def empty(self) -> tuple[build.CausalModel, PreTrainedModel]:
        """The model as `load_model` builds it, on the meta device."""
        method = self.tuning.method
        base = empty_model(self.config, torch.float32 if method is Method.FULL else self.precision, "eager")
        base.set_attn_implementation(DOCUMENTS)
        root = build.CausalModel(
            build._attach(base, method, self.tuning, self.precision, None),
            method=method,
            attention=DOCUMENTS,
            label_smoothing=0.0,
            neftune_alpha=0.0,
            autocast=self.precision if self.ranks == 1 and self.bf16 else None,
        )
        build._train_in_float32(root)
        if self.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return root, base


def config_json(config: PretrainedConfig) -> dict[str, Any]:
    """What `config.json` of such a model holds."""
    data: dict[str, Any] = config.to_dict()
    if not data.get("architectures"):
        data["architectures"] = [type(config).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    return data


@contextmanager
def imaginary_ranks(count: int) -> Iterator[None]:
    """A process group of ranks that are not there: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _eager_collection() -> Iterator[None]:
    """The tracker's hooks hold what they look at in cycles: they go soon, whatever other tests have left behind."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.collect()
    gc.set_threshold(500, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def tracked_peak(case: Case) -> dict[str, int]:
    """Peak memory of rank 0 by torch's FSDP memory tracker, forward and backward, in bytes by its categories."""
    with imaginary_ranks(case.ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root, base = case.empty()
        embeddings = [] if build._tied(base) else [base.get_input_embeddings()]
        mesh = init_device_mesh("cpu", (case.ranks,))
        shard(root, list(adapters.decoder_layers(base)), embeddings, mesh, case.precision)
        with FakeTensorMode(allow_non_fake_inputs=True):
            buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
            build._materialise(root, base, buffers, torch.device("cpu"))
            trained = {name: p for name, p in root.named_parameters() if p.requires_grad}
            optimizer = Optimizer(trained, world_size=case.ranks)
            root.train()
            tracker = FSDPMemTracker(root, optimizer._adamw)
            batch = case.batch()
            with tracker, _eager_collection():
                (root(batch) * batch.target_weight).sum().backward()
    [snapshot] = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): int(size) for kind, size in snapshot.items()}


def kept_bytes(case: Case) -> int:
    """Bytes that autograd keeps after the forward pass of a real, small model: each storage once, no parameters.

    More than one rank stands for FSDP, whose parameters are in the type of the products when they are used.
    """
    root, base = case.empty()
    buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
    build._materialise(root, base, buffers, torch.device("cpu"))
    for parameter in root.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(case.precision) if case.ranks > 1 else parameter.data
            torch.nn.init.normal_(parameter, std=0.02)
    if case.tuning.method is Method.QLORA:
        _quantise(base, case)
    if case.compiled:
        torch._dynamo.reset()
        for layer in adapters.decoder_layers(base):
            layer.compile(backend="aot_eager_decomp_partition")  # the partitioner of inductor, without its compiler
    root.train()
    batch = case.batch()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in root.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (root(batch) * batch.target_weight).sum()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


def _quantise(base: PreTrainedModel, case: Case) -> None:
    for name, module in nf4.linear_4bit(base).items():
        weight = torch.randn(module.out_features, module.in_features, generator=adapters.generator(0, name))
        packed = nf4.quantize(weight.to(case.precision), case.tuning.quantization)
        from bitsandbytes.functional import QuantState

        state = {key.removeprefix("."): value for key, value in packed.items() if key}
        module.quant_state = QuantState.from_dict(state, device=torch.device("cpu"))
        module.weight.data.copy_(packed[""])
