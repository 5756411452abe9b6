"""`auto` takes what the device computes fast."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.model.device import choose_compile, choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("requested", "capabilities", "expected"),
    [
        ("auto", {"avx2": True}, torch.float32),
        ("auto", {"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ("auto", {"amx_bf16": True}, torch.bfloat16),
        ("auto", {"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ("bf16", {"avx2": True}, torch.bfloat16),
        ("fp32", {"amx_bf16": True}, torch.float32),
    ],
)
def test_a_cpu_computes_in_bf16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, requested: str, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    precision, choice = choose_precision(requested, CPU)
    assert precision is expected
    assert choice.value == ("bf16" if expected is torch.bfloat16 else "fp32")
    assert choice.why


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bf16_if_it_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    assert choose_precision("auto", CUDA)[0] is expected


@pytest.mark.parametrize(
    ("requested", "device", "expected"),
    [(None, CPU, False), (None, CUDA, True), (True, CPU, True), (False, CUDA, False)],
)
def test_layers_are_compiled_on_gpus_unless_the_spec_says_otherwise(
    requested: bool | None, device: torch.device, expected: bool
) -> None:
    assert choose_compile(requested, device)[0] is expected
