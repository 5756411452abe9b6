"""Packed documents never see each other, whatever the architecture and the attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.architectures import USUAL, tiny_architecture
from tests.support.batches import examples, packed, padded
from tests.support.loading import load, tuning
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.report import FailureClass
from finetune_trainer.data.packing import Batch
from finetune_trainer.failures import TrainerError
from finetune_trainer.model import attention, build
from finetune_trainer.model.attention import DOCUMENTS, FLASH, FLEX, KNOW_SHARED_PREFIXES, VARLEN, choose_attention

LENGTHS = (5, 17, 1, 9, 12)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def alone(directory: Path, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """Cross entropies of each document on its own, by transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for document in examples(lengths):
        with torch.no_grad():
            logits = model(document.tokens).logits[0, :-1]
        found.append(functional.cross_entropy(logits, document.tokens[0, 1:], reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        *((name, "auto") for name in (*USUAL, "cohere", "granite")),
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("mistral", "eager"),
    ],
)
def test_losses_of_packed_documents_are_those_of_each_alone(tmp_path: Path, architecture: str, attention: str) -> None:
    directory = tiny_architecture(tmp_path, architecture)
    model = load(directory, tuning("full"), attention=attention)
    losses = model.eval()(packed(examples(LENGTHS), multiple=8))
    torch.testing.assert_close(losses, alone(directory), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_losses_of_padded_documents_are_those_of_each_alone(tmp_path: Path, architecture: str) -> None:
    directory = tiny_architecture(tmp_path, architecture)
    model = load(directory, tuning("full"), packing=False)
    losses = model.eval()(padded(examples(LENGTHS)))
    torch.testing.assert_close(losses, alone(directory), rtol=1e-5, atol=1e-5)


def test_gradients_through_packed_documents_are_those_of_each_alone(tmp_path: Path) -> None:
    directory = tiny_architecture(tmp_path, "mistral")
    together, apart = load(directory, tuning("full")), load(directory, tuning("full"))
    documents = examples(LENGTHS)
    together(packed(documents)).sum().backward()
    for document in documents:
        apart(packed([document])).sum().backward()
    for (name, one), (_, other) in zip(together.trainable, apart.trainable, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_an_architecture_whose_documents_leak_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_bounds(batch: Batch, implementation: str) -> dict[str, object]:
        return {}

    directory = tiny_architecture(tmp_path, "llama")
    monkeypatch.setattr(build, "attention_arguments", forget_the_bounds)
    with pytest.raises(TrainerError, match=r"different results for packed .* Remove training\.packing") as refusal:
        load(directory, packing=True)
    assert refusal.value.failure_class is FailureClass.BAD_SPEC
    model = load(directory)
    assert not model.packs
    assert model.choices["packing"].value == "off"
    torch.testing.assert_close(model.eval()(padded(examples(LENGTHS))), alone(directory), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "requested", "device", "precision", "packing", "expected"),
    [
        ("llama", "auto", CPU, torch.float32, True, DOCUMENTS),
        ("llama", "auto", CPU, torch.bfloat16, True, DOCUMENTS),
        ("llama", "auto", CUDA, torch.bfloat16, True, VARLEN),
        ("llama", "auto", CUDA, torch.float32, True, DOCUMENTS),
        ("llama", "auto", CPU, torch.float32, False, "sdpa"),
        ("llama", "sdpa", CPU, torch.float32, True, DOCUMENTS),
        ("llama", "eager", CPU, torch.float32, True, "eager"),
        ("llama", "flex", CUDA, torch.bfloat16, True, FLEX),
        ("gemma2", "auto", CPU, torch.float32, True, "eager"),
        ("gemma2", "auto", CUDA, torch.bfloat16, True, "eager"),
        ("mistral", "auto", CUDA, torch.bfloat16, True, VARLEN),
    ],
)
def test_auto_takes_the_fastest_attention_that_keeps_documents_apart(
    architecture: str, requested: str, device: torch.device, precision: torch.dtype, packing: bool, expected: str
) -> None:
    found = choose_attention(
        requested,
        config=AutoConfig.for_model(architecture),
        supports_backend=True,
        packed=packing,
        device=device,
        precision=precision,
    )
    assert found.implementation == expected
    assert found.choice.why


def test_auto_does_not_give_up_shared_prefixes_for_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda: True)
    for requested, expected in (("auto", VARLEN), ("flash", FLASH)):
        found = choose_attention(
            requested,
            config=AutoConfig.for_model("llama"),
            supports_backend=True,
            packed=True,
            device=CUDA,
            precision=torch.bfloat16,
        )
        assert found.implementation == expected
    assert VARLEN in KNOW_SHARED_PREFIXES


@pytest.mark.parametrize(
    ("architecture", "requested", "device", "precision", "sentence"),
    [
        ("llama", "flash", CPU, torch.float32, "needs a GPU and 16-bit precision"),
        ("llama", "flash", CUDA, torch.bfloat16, "flash-attn is not installed"),
        ("llama", "flex", CPU, torch.float32, "no backward pass on a CPU"),
        ("llama", "varlen", CPU, torch.float32, "needs a GPU and 16-bit precision"),
        ("gemma2", "varlen", CUDA, torch.bfloat16, "caps its attention scores"),
        ("gemma2", "sdpa", CPU, torch.float32, "caps its attention scores"),
    ],
)
def test_an_attention_that_cannot_be_had_is_refused_with_a_way_out(
    architecture: str, requested: str, device: torch.device, precision: torch.dtype, sentence: str
) -> None:
    with pytest.raises(TrainerError, match=sentence) as refusal:
        choose_attention(
            requested,
            config=AutoConfig.for_model(architecture),
            supports_backend=True,
            packed=True,
            device=device,
            precision=precision,
        )
    assert refusal.value.field == "model.attention"
    assert "set model.attention to" in refusal.value.sentence
