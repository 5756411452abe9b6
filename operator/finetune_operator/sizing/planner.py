"""Rows, memory, steps and time of a run, from the spec, the model's shape and the documents' lengths. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal

from finetune_api.report import LengthFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.sizing.gpus import GpuType
from finetune_operator.sizing.memory import Memory, Run
from finetune_operator.sizing.model_shapes import Shape

UTILISATION, UTILISATION_4_BIT = 0.40, 0.30
"""Share of the peak speed that is assumed. Published: Llama-3-8B, LoRA, one H100, bf16: 402 of 989 TFLOP/s;
4-bit weights are dequantised for every product."""
ROW_STEP = 256
"""Tokens by which the length of a row is varied."""
EFFICIENT_ROW = 2048
"""A GPU computes shorter rows no faster: activations are recomputed before rows get shorter than this."""
ROW_BUDGET = 0.88
"""Share of the GPU's memory that a plan may use: activations are estimated to within some 15%."""
LARGEST_ROW = 65_536
"""Longer rows are no faster."""
CPU_ROW = 768
"""Tokens of a row on a CPU, where longer rows are no faster and take more memory."""
UNKNOWN_GPU_ROW = 8192
"""Tokens of a row where the GPU is unknown; running out of memory halves it."""


@dataclass(frozen=True)
class Planner:
    """Everything that decides a plan."""

    spec: FineTuneJobSpec
    shape: Shape
    lengths: LengthFacts
    gpu: GpuType | None
    price_per_gpu_hour: float | None
    cpu_bf16: bool = False
    """Whether the CPU has instructions for bf16."""

    # --- where it runs ---

    @property
    def cuda(self) -> bool:
        """Whether GPUs compute."""
        return self.spec.topology.gpus_per_node != 0

    @property
    def ranks_per_node(self) -> int:
        """Processes per node."""
        return max(1, 1 if self.spec.topology.gpus_per_node is None else self.spec.topology.gpus_per_node)

    @property
    def ranks(self) -> int:
        """Processes over all nodes: the world size."""
        return self.spec.topology.nodes * self.ranks_per_node

    @property
    def _compute_bytes(self) -> Literal[2, 4]:
        asked = self.spec.training.precision
        if asked == "auto":
            fast = self.gpu is None or self.gpu.bf16 if self.cuda else self.cpu_bf16
            return 2 if fast else 4
        return 2 if asked == "bf16" else 4

    # --- how much there is to do ---

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.spec.training.total_steps(self.lengths.documents)

    @cached_property
    def _examples_per_step(self) -> float:
        batch, documents = self.spec.training.global_batch_size, self.lengths.documents
        return documents / max(1, ceil(documents / batch))

    @cached_property
    def _tokens_per_document(self) -> float:
        return self.lengths.tokens / max(1, self.lengths.documents)

    @cached_property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return round(self.steps * self._examples_per_step * self._tokens_per_document)

    @cached_property
    def tokens_per_rank_step(self) -> int:
        """Mean tokens per rank and step."""
        return ceil(self._examples_per_step * self._tokens_per_document / self.ranks)

    # --- rows and memory ---

    @cached_property
    def shortest_row(self) -> int:
        """No row can be shorter than the longest document."""
        return max(1, self.lengths.longest + self.spec.tuning.virtual_tokens)

    def memory(self, row: int, checkpointing: bool) -> Memory:
        """Peak memory of a rank whose rows have `row` tokens."""
        spec, topology = self.spec, self.spec.topology
        hybrid = topology.sharding == "hybrid" and topology.nodes > 1
        run = Run(
            tuning=spec.tuning,
            compute_bytes=self._compute_bytes,
            cuda=self.cuda,
            ranks=self.ranks,
            shard_ranks=self.ranks_per_node if hybrid else self.ranks,
            checkpointing=checkpointing,
            compiled=self.cuda if spec.training.compile is None else spec.training.compile,
            accumulates=self.rows_per_step(row) > 1,
            labelled_share=min(1.0, self.lengths.labelled / max(1, self.lengths.tokens)),
            longest=self.lengths.longest,
        )
        return Memory(self.shape, run)

    def rows_per_step(self, row: int) -> int:
        """Rows per rank and step, if its share of the tokens fills them."""
        return max(1, ceil(self.tokens_per_rank_step / row))

    def _fits(self, row: int, checkpointing: bool) -> bool:
        """Whether a row of `row` tokens stays within the memory that a plan may use."""
        assert self.gpu is not None
        return self.memory(row, checkpointing).total(row) <= ROW_BUDGET * self.gpu.memory_bytes

    @cached_property
    def layout(self) -> tuple[int, bool]:
        """Tokens of a row and whether activations are recomputed.

        As much of a rank's step in one row as fits. Recomputed only if asked for, or if neither the longest document
        nor a row that a GPU computes well would fit otherwise.
        """
        asked = self.spec.training.activation_checkpointing
        if not self.cuda:
            return max(self.shortest_row, CPU_ROW), bool(asked)
        if self.gpu is None:
            return max(self.shortest_row, min(self._wanted_row, UNKNOWN_GPU_ROW)), bool(asked)
        least = max(self.shortest_row, min(EFFICIENT_ROW, self._wanted_row))
        can_recompute = self.spec.tuning.method.traits.can_recompute
        checkpointing = can_recompute and not self._fits(least, False) if asked is None else asked
        return self._longest_fitting(checkpointing), checkpointing

    @cached_property
    def _wanted_row(self) -> int:
        """Room for all tokens of a rank's step, and a little more: rows are not filled to the last token."""
        wanted = ceil(1.1 * self.tokens_per_rank_step / ROW_STEP) * ROW_STEP
        return max(self.shortest_row, min(wanted, LARGEST_ROW))

    def _longest_fitting(self, checkpointing: bool) -> int:
        low, high = 0, ceil((self._wanted_row - self.shortest_row) / ROW_STEP)
        while low < high:  # rows of shortest_row + n * ROW_STEP: the largest n that fits
            middle = (low + high + 1) // 2
            if self._fits(self.shortest_row + middle * ROW_STEP, checkpointing):
                low = middle
            else:
                high = middle - 1
        return self.shortest_row + low * ROW_STEP

    # --- time ---

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of the whole run.

        With N matrix elements that a token goes through: forward 2N, gradients of activations 2N through the layers
        above the lowest that is trained, gradients of weights 2N of those that are trained: 6N for full tuning, 4N
        and the adapters for LoRA. Recomputation adds 2N. Attention adds 2 * length * width per layer and pass (half of
        it is masked). The head is computed at labelled positions only.
        """
        memory = self.memory(*self.layout)
        facts = self.shape.facts
        layers = facts.num_hidden_layers
        backward = len(memory.layers_with_backward) / max(1, layers)
        passes = 1 + backward + (backward if self.layout[1] else 0)
        active = self.shape.active_parameters
        full = self.spec.tuning.method.traits.trains_base
        trained = active if full else memory.trained_parameters
        queries = facts.num_attention_heads * facts.head_dim
        attention = layers * 2 * self._tokens_per_document * queries
        head = facts.vocab_size * facts.hidden_size
        labelled = min(1.0, self.lengths.labelled / max(1, self.lengths.tokens))
        per_token = (2 * active + attention) * passes + attention * backward + 2 * trained
        return self.tokens * (per_token + labelled * head * (6 if full else 4))

    @cached_property
    def utilisation(self) -> float:
        """Assumed share of the GPUs' peak speed; less where several GPUs have too little to compute between gathers."""
        busy = 1.0 if self.ranks == 1 else min(1.0, self.tokens_per_rank_step / EFFICIENT_ROW)
        return (UTILISATION_4_BIT if self.spec.tuning.method.traits.four_bit else UTILISATION) * busy

    @cached_property
    def hours(self) -> float | None:
        """Hours on the GPUs, at the assumed utilisation."""
        if self.gpu is None or not self.cuda:
            return None
        return self.flops / (self.ranks * self.gpu.flops * self.utilisation) / 3600

    # --- the plan ---

    def plan(self) -> Plan:
        """The plan, without warnings."""
        row, checkpointing = self.layout
        memory = self.memory(row, checkpointing)
        components = memory.components(row)
        total = sum(component.bytes for component in components)
        price = self.price_per_gpu_hour
        return Plan(
            world_size=self.ranks,
            steps=self.steps,
            examples=self.lengths.documents,
            tokens=self.tokens,
            tokens_per_rank_step=self.tokens_per_rank_step,
            trainable_parameters=memory.trained_parameters,
            parameters=self.shape.facts.parameters,
            micro_batch_tokens=row,
            micro_batches=self.rows_per_step(row),
            activation_checkpointing=checkpointing,
            memory=components,
            memory_bytes=total,
            host_bytes=memory.host(row, self.ranks_per_node),
            device_bytes=self.gpu.memory_bytes if self.gpu else None,
            fits=total <= self.gpu.memory_bytes if self.gpu else None,
            flops=self.flops,
            device=self.gpu.name if self.gpu else "",
            utilisation=self.utilisation if self.hours is not None else None,
            hours=self.hours,
            price=self.hours * self.ranks * price if self.hours is not None and price is not None else None,
        )
