"""The loss of labelled positions, in chunks, equals the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.batches import examples, packed
from tests.support.loading import load, tuning
from tests.support.tiny import tiny_llama
from torch import nn
from torch.nn import functional

from finetune_trainer.model import loss
from finetune_trainer.model.loss import target_losses

TOKENS, HIDDEN, VOCABULARY = 40, 8, 50


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_in_chunks_are_those_of_all_positions_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, smoothing: float
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    position, target = torch.randint(TOKENS, (23,)), torch.randint(VOCABULARY, (23,))

    losses, correct = target_losses(hidden, position, target, head, VOCABULARY, smoothing)
    losses.sum().backward()
    found = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    logits = head(hidden)[position]
    expected = functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    expected.sum().backward()

    torch.testing.assert_close(losses, expected)
    assert torch.equal(correct, logits.argmax(-1) == target)
    torch.testing.assert_close(found, (hidden.grad, head.weight.grad))


def test_losses_are_float32_when_products_are_bfloat16() -> None:
    head = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.bfloat16)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    losses, _ = target_losses(hidden, torch.arange(3), torch.arange(3), head, VOCABULARY)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_batch_without_labels_gives_zero_gradients_and_not_none(tmp_path: Path, method: str) -> None:
    model = load(tiny_llama(tmp_path), tuning(method))
    losses = model(packed([]))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for _, parameter in model.trainable)


def test_label_smoothing_is_for_training_alone(tmp_path: Path) -> None:
    directory, batch = tiny_llama(tmp_path), packed(examples([9, 5]))
    smoothed, plain = load(directory, label_smoothing=0.2), load(directory)
    assert (smoothed(batch) - plain(batch)).abs().min() > 1e-3
    torch.testing.assert_close(smoothed.eval()(batch), plain.eval()(batch))


def test_correct_says_where_the_target_is_the_most_likely_token(tmp_path: Path) -> None:
    directory, batch = tiny_llama(tmp_path), packed(examples([30, 40]))
    model = load(directory, tuning("full")).eval()
    with torch.no_grad():
        losses, correct = model(batch, with_correct=True)
        logits = model.causal_lm(batch.ids[:, :30]).logits[0]
    assert torch.equal(correct[:29], logits[:29].argmax(-1) == batch.target_id[:29])
    torch.testing.assert_close(losses, model(batch))


def test_neftune_noise_is_bounded_by_each_documents_own_length(tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path, hidden=64), neftune_alpha=5.0)
    batch = packed(examples([4, 16]))
    seen: list[torch.Tensor] = []
    embedding = model.causal_lm.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    model(batch)
    noise = (seen[0] - embedding.weight[batch.ids]).abs()[0]
    for part, length in ((noise[:4], 4), (noise[4:], 16)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.8 * bound < part.max() <= bound
    model.eval()(batch)
    assert torch.equal(seen[1], embedding.weight[batch.ids])


def test_neftune_noise_follows_the_random_state_of_the_step(tmp_path: Path) -> None:
    model, batch = load(tiny_llama(tmp_path), neftune_alpha=5.0), packed(examples([9, 5]))

    def losses(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(batch).detach()

    assert torch.equal(losses(1), losses(1))
    assert not torch.equal(losses(1), losses(2))
