"""`auto` takes what the device computes fast."""

from __future__ import annotations

import pytest
import torch

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.model.device import choose_compile, choose_device, choose_precision

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


@pytest.mark.parametrize(("local_rank", "asked", "found", "device"), [(0, 0, 2, "cpu"), (0, None, 0, "cpu")])
def test_without_gpus_in_the_spec_or_on_the_machine_the_cpu_is_taken(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, asked: int | None, found: int, device: str
) -> None:
    _pretend_gpus(monkeypatch, found)
    assert choose_device(local_rank, asked).type == device


@pytest.mark.parametrize(("local_rank", "found"), [(0, 0), (1, 1), (3, 2)])
def test_gpus_that_were_asked_for_and_are_not_there_are_no_reason_to_train_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, found: int
) -> None:
    _pretend_gpus(monkeypatch, found)
    with pytest.raises(TrainerError, match=rf"4 GPUs \(topology.gpusPerNode\), but CUDA finds {found}") as refused:
        choose_device(local_rank, 4)
    assert refused.value.failure_class is FailureClass.CRASH


def _pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
