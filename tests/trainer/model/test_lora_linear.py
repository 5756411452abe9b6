"""The product of a LoRA layer: what PEFT computes, rounded no worse, with less kept for the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraLayer
from tests.support.batches import examples, packed
from tests.support.loading import load, tuning
from tests.support.tiny import tiny_llama
from torch import Tensor, nn

from finetune_trainer.model.lora_linear import LoraLinear


def layers(dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Linear, LoraLinear]:
    """PEFT's layer and ours with the same random weights, the adapter in float32."""
    config = LoraConfig(r=4, lora_alpha=7, init_lora_weights=False, **fields)
    torch.manual_seed(0)
    theirs, ours = (
        kind(nn.Linear(48, 80, dtype=dtype), "default", config=config, r=4, lora_alpha=7)
        for kind in (Linear, LoraLinear)
    )
    torch.nn.init.normal_(theirs.lora_B["default"].weight, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    for layer in (theirs, ours):
        layer.get_base_layer().requires_grad_(False)
    return theirs, ours


def outcome(layer: Linear, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients for random inputs and output gradients, in float32."""
    random = torch.Generator().manual_seed(1)
    given = torch.randn(1, 33, 48, generator=random).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer(given)
    output.backward(torch.randn(output.shape, generator=random).to(dtype))
    assert output.dtype == dtype
    named = {"output": output, "input": given.grad, **{n: p.grad for n, p in layer.named_parameters() if "lora" in n}}
    return {name: tensor.detach().float() for name, tensor in named.items() if tensor is not None}


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_it_computes_what_peft_computes(fields: dict[str, bool]) -> None:
    theirs, ours = (outcome(layer) for layer in layers(**fields))
    assert theirs.keys() == ours.keys() >= {"output", "input", "lora_A.default.weight", "lora_B.default.weight"}
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_in_bfloat16_it_rounds_no_worse_than_peft() -> None:
    exact, _ = layers()
    with torch.no_grad():
        exact.get_base_layer().weight.copy_(exact.get_base_layer().weight.bfloat16())
        exact.get_base_layer().bias.copy_(exact.get_base_layer().bias.bfloat16())
    expected = outcome(exact)
    theirs, ours = (outcome(layer, torch.bfloat16) for layer in layers(torch.bfloat16))
    for name, value in expected.items():
        assert off(ours[name], value) < max(0.004, 1.1 * off(theirs[name], value)), name


def test_no_copy_of_the_input_is_kept() -> None:
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    _, layer = layers(torch.bfloat16)
    given = torch.randn(1, 33, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(given)
    assert given.untyped_storage().data_ptr() in kept
    assert len(kept) <= 5  # the input, its product with A, W, A and B


def test_an_adapter_that_is_switched_off_changes_nothing() -> None:
    _, layer = layers()
    given = torch.randn(1, 5, 48)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(given), layer.get_base_layer()(given))


@pytest.mark.parametrize(("fields", "plain"), [({}, True), ({"dora": True}, False)])
def test_models_are_given_it_and_learn_with_any_of_its_forms(
    tmp_path: Path, fields: dict[str, Any], plain: bool
) -> None:
    model = load(tiny_llama(tmp_path), tuning("lora", **fields))
    found = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {type(module) for module in found} == {LoraLinear}
    assert {module._plain_adapter() is not None for module in found} == {plain}  # type: ignore[operator]
    model(packed(examples([9]))).sum().backward()
    assert all(p.grad is not None for _, p in model.trainable)
