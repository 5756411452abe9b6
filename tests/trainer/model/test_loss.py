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


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (7, 3), (1000, 4), (1000, 1000)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_in_chunks_are_those_of_all_positions_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, block: int, smoothing: float
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", block * VOCABULARY)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    position, target = torch.randint(TOKENS, (23,)), torch.randint(VOCABULARY, (23,))

    weight = torch.rand(23)

    losses, correct = target_losses(hidden, position, target, head, VOCABULARY, smoothing)
    (losses * weight).sum().backward()
    found = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    logits = head(hidden)[position]
    expected = functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    (expected * weight).sum().backward()

    torch.testing.assert_close(losses, expected)
    assert torch.equal(correct, logits.argmax(-1) == target)
    torch.testing.assert_close(found, (hidden.grad, head.weight.grad))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_bfloat16_products_are_float32_and_round_as_if_all_logits_were(smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, VOCABULARY).mul(20).bfloat16().requires_grad_()
    target, weight = torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS)

    losses, correct = target_losses(logits, torch.arange(TOKENS), target, nn.Identity(), VOCABULARY, smoothing)
    (losses * weight).sum().backward()
    found, logits.grad = logits.grad, None
    expected = functional.cross_entropy(logits.float(), target, reduction="none", label_smoothing=smoothing)
    (expected * weight).sum().backward()

    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    assert torch.equal(correct, logits.argmax(-1) == target)
    torch.testing.assert_close(found, logits.grad, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_chunk_the_logits_are_kept_once_in_their_own_type(dtype: torch.dtype) -> None:
    head, hidden = nn.Linear(HIDDEN, VOCABULARY, dtype=dtype), torch.randn(TOKENS, HIDDEN, dtype=dtype)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = target_losses(hidden, torch.arange(TOKENS), torch.arange(TOKENS), head, VOCABULARY)
    assert losses.requires_grad
    large = [size for size in kept.values() if size >= TOKENS * VOCABULARY]
    assert large == [TOKENS * VOCABULARY * dtype.itemsize]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_leaves_the_logits_as_they_were(dtype: torch.dtype) -> None:
    logits = torch.randn(TOKENS, VOCABULARY, dtype=dtype, requires_grad=True)
    before = logits.detach().clone()
    losses, _ = target_losses(logits, torch.arange(TOKENS), torch.arange(TOKENS), nn.Identity(), VOCABULARY)
    losses.sum().backward()
    assert torch.equal(logits, before)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e38, 0.0], [-3e38, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    losses, _ = target_losses(logits, torch.arange(2), torch.tensor([0, 1]), nn.Identity(), 2)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert logits.grad is not None
    assert not logits.grad.any()


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
