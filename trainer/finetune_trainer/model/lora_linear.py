"""PEFT's LoRA layer with fewer passes over memory; what is trained, saved and exported is PEFT's own.

PEFT casts a layer's input to the adapter's float32 (which autocast casts back for the product, and keeps), multiplies
a result of the output's size by the scale and adds it to the base's. Here the input is taken as it is, the scale goes
to the small factor, and the sum is part of the second product.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor


class LoraLinear(Linear):  # type: ignore[misc]
    """A linear layer with one plain LoRA adapter; whatever else it may carry is computed by PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + s B (A x): [..., in] -> [..., out], in the type of the products."""
        adapter = self._plain_adapter()
        if adapter is None or args or kwargs:
            computed: Tensor = super().forward(x, *args, **kwargs)
            return computed
        base = self.base_layer(x)
        small = self.lora_A[adapter](self.lora_dropout[adapter](x)) * self.scaling[adapter]
        both = torch.addmm(base.flatten(0, -2), small.flatten(0, -2), self.lora_B[adapter].weight.t())
        return both.view_as(base)

    def _plain_adapter(self) -> str | None:
        """The one adapter that is active, if it is LoRA and nothing more."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return None
        plain = names[0] not in self.lora_variant and self.lora_B[names[0]].bias is None
        return str(names[0]) if plain else None
