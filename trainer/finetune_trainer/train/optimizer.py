"""AdamW over the trainable parameters, with clipping and skipping inside the fused kernel.

Everything here works on this rank's shards, without communication. The squared gradient norm is this
rank's share of it, so that the loop's one all-reduce sums it together with the loss.
"""

from __future__ import annotations

import re
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

NOT_DECAYED = re.compile(r"embed|norm|bias|magnitude", re.IGNORECASE)


class Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101), fused, its state allocated from the start.

    `b_plus_ratio` is LoRA+'s factor on the learning rate of B matrices (https://arxiv.org/abs/2402.12354).
    `weight_decay` never touches vectors (norms, biases, DoRA's magnitudes) and embeddings.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        b_plus_ratio: float = 1.0,
        world_size: int = 1,
    ) -> None:
        self.parameters = parameters
        self._max_grad_norm = max_grad_norm
        self._world_size = world_size
        groups = _groups(parameters, weight_decay, b_plus_ratio)
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        for parameter in parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def squared_norm(self) -> Tensor:
        """float64[]: this rank's share of the squared global gradient norm; the sum over ranks is the square."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = torch._foreach_norm([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads])
        shares = torch.tensor([1 / _copies(grad, self._world_size) for grad in grads], dtype=torch.float64)
        return torch.stack(norms).double().square() @ shares.to(norms[0].device, non_blocking=True)

    def step(self, learning_rate: float, squared_norm: Tensor) -> None:
        """One update with the gradients as they are, clipped by their global norm; none if that is not finite.

        `squared_norm` is float64[] on the device, summed over the ranks: it is never read by the host. A skipped
        update leaves parameters, moments and their counter as they were.
        """
        norm = squared_norm.sqrt()
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self._adamw.grad_scale = (norm / self._max_grad_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
        self._adamw.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self._adamw.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, moments and counters by name, as they stand (shards of DTensors): what a checkpoint holds."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = parameter.detach()
            state |= {f"{key}.{name}": value for key, value in self._adamw.state[parameter].items()}
        return state


def _groups(parameters: dict[str, nn.Parameter], weight_decay: float, b_plus_ratio: float) -> list[dict[str, object]]:
    """Parameter groups by decay, ratio and whether sharded (the fused kernel takes one kind at a time)."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if parameter.dim() < 2 or NOT_DECAYED.search(name) else weight_decay
        ratio = b_plus_ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0
        groups.setdefault((decay, ratio, isinstance(parameter.data, DTensor)), []).append(parameter)
    return [{"params": ps, "weight_decay": decay, "ratio": ratio} for (decay, ratio, _), ps in groups.items()]


def _copies(gradient: Tensor, world_size: int) -> int:
    """How many ranks hold the same gradient: those of the mesh's replicated dimensions, or all if it is whole."""
    if not isinstance(gradient, DTensor):
        return world_size
    mesh = gradient.device_mesh
    return prod(mesh.size(dim) for dim, placement in enumerate(gradient.placements) if placement.is_replicate())
