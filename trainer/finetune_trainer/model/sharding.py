"""FSDP2 over a model: by layer, then the rest; and the assertion that it did happen.

Gradients are SUMMED over ranks, never averaged: the shares of train/loss_scaling.py already contain the step's
denominator, which is exact for uneven batches and accumulation.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(
    root: nn.Module, layers: list[nn.Module], embeddings: list[nn.Module], mesh: DeviceMesh, precision: torch.dtype
) -> None:
    """Shard `root` in place over `mesh` ([ranks], or [replicas, ranks] for hybrid).

    Each layer is a group of its own, gathered for its forward and again for its backward pass. `embeddings` (input
    embeddings that are not tied to the head) too. What is left over (final norm, head, tied embeddings, prompt) is
    the root's group: gathered once per pass and kept until the end of the backward pass.

    Products are computed in `precision`; gradients are reduced in float32. Trainable parameters keep their own data
    type (float32) as shards; FSDP asks for a uniform type of the trainable ones only, frozen 4-bit and 16-bit
    weights may stand beside them in a group.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == torch.float32 else precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for module in [*layers, *embeddings]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    assert_sharded(root)


def assert_sharded(root: nn.Module) -> None:
    """Raise RuntimeError unless every parameter is a DTensor: a model that is silently whole trains wrongly."""
    plain = [name for name, parameter in root.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        raise RuntimeError(f"{len(plain)} parameters are not sharded, among them {plain[0]}")
