"""What documents begin with is computed once, and losses and gradients are those of separate rows."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support.architectures import tiny_architecture
from tests.support.batches import PAD, Example, packed
from tests.support.loading import load, tuning
from tests.support.tiny import tiny_llama
from torch import Tensor

from finetune_api.report import FailureClass
from finetune_trainer.data.packing import collate_packed
from finetune_trainer.data.prefixes import shared_prefixes
from finetune_trainer.failures import TrainerError
from finetune_trainer.model import shared_prefix
from finetune_trainer.model.build import CausalModel
from finetune_trainer.model.shared_prefix import Layout, shared_prefix_attention

Family = tuple[int, tuple[int, ...], int]
"""Tokens of the prefix, own tokens of each document, labelled tokens at the end of each at most."""

FAMILIES: dict[str, list[Family]] = {
    "one group": [(20, (5, 3, 9, 4), 2)],
    "several groups and documents alone": [(12, (4, 7), 3), (0, (9, 14), 4), (30, (2, 2, 6), 2), (0, (1,), 1)],
    "no prefix": [(0, (6, 11, 3), 2)],
    "prefix and one token": [(25, (1, 1, 1), 1)],
    "all own tokens labelled": [(16, (4, 8, 2), 99)],
    "a prefix longer than the own parts, and shorter": [(9, (40, 1, 23), 5), (40, (3, 12), 2)],
}


def documents(families: list[Family]) -> list[Example]:
    """Documents of random tokens, group by group; their first own tokens differ."""
    random = np.random.default_rng(3)
    found = []
    for prefix, owns, most in families:
        beginning = random.integers(4, 200, prefix)
        for number, own in enumerate(owns):
            ids = np.concatenate([beginning, [200 + number], random.integers(4, 200, own - 1)]).astype(np.int32)
            labelled = min(most, own, len(ids) - 1)
            position = np.arange(len(ids) - 1 - labelled, len(ids) - 1, dtype=np.int32)
            weight = random.uniform(0.5, 2, labelled).astype(np.float32)
            found.append(Example(ids, position, ids[position + 1], weight))
    return found


def outcome(model: CausalModel, found: list[Example], share: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses by document and target, and gradients of the weighted sum, of one row or of a row per document."""
    model.zero_grad()
    rows = [list(range(len(found)))] if share else [[i] for i in range(len(found))]
    groups = shared_prefixes(found) if share else []
    losses = []
    for row in rows:
        chosen = [found[i] for i in row]
        batch = collate_packed(chosen, row, [d.target_weight for d in chosen], PAD, 8, groups)
        own = model(batch)
        (own * batch.target_weight).sum().backward()
        losses.append(own.detach())
    return torch.cat(losses), {n: p.grad.clone() for n, p in model.trainable if p.grad is not None}


def assert_same(model: CausalModel, found: list[Example], tolerance: float = 1e-5) -> None:
    expected, gradients = outcome(model, found, share=False)
    losses, shared = outcome(model, found, share=True)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    assert shared.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 or ".lora_A." in name  # B begins at zero
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(shared[name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module", params=["full", "lora", "dora"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    how = tuning("lora", dora=True) if request.param == "dora" else tuning(request.param)
    found = load(tiny_architecture(tmp_path_factory.mktemp("model"), "qwen3"), how)
    with torch.no_grad():
        for name, parameter in found.trainable:
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_every_gradient_are_those_of_separate_rows(model: CausalModel, name: str) -> None:
    assert model.shares_prefixes
    found = documents(FAMILIES[name])
    assert len(shared_prefixes(found)) == sum(prefix > 0 and len(owns) > 1 for prefix, owns, _ in FAMILIES[name])
    assert_same(model, found)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma3_text", "cohere", "granite", "mixtral"])
def test_other_architectures_too_with_narrow_windows_and_experts(tmp_path: Path, architecture: str) -> None:
    model = load(tiny_architecture(tmp_path, architecture), tuning("full"))
    assert model.choices["sharedPrefixes"].value == "on"
    assert_same(model, documents(FAMILIES["several groups and documents alone"]))


def test_recomputed_activations_give_the_same(tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path), tuning("full"), activation_checkpointing=True)
    assert_same(model, documents(FAMILIES["one group"]))


def test_in_bfloat16_it_differs_by_rounding_only(tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path), tuning("full"), precision=torch.bfloat16)
    assert model.shares_prefixes
    assert_same(model, documents(FAMILIES["several groups and documents alone"]), tolerance=2e-2)


# --- the kernel for GPUs, on a CPU -----------------------------------------------------------------------------------


def flash_by_hand(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], most: tuple[int, int], *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """What the variable-length kernel computes: [T, H, D] -> [T, H, D], [H, T]."""
    outputs, sums = [], []
    of_queries, of_keys = (bound.tolist() for bound in bounds)
    assert (of_queries[-1], of_keys[-1]) == (len(q), len(k))
    for a, b, c, d in zip(of_queries, of_queries[1:], of_keys, of_keys[1:], strict=False):
        assert b - a <= most[0]
        assert d - c <= most[1]
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, d - c).triu(1).bool(), -torch.inf)
        sums.append(scores.logsumexp(-1))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
    return torch.cat(outputs), torch.cat(sums, 1)


def flash_backward_by_hand(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: tuple[Tensor, Tensor],
    most: tuple[int, int],
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward pass, from the output and log-sum-exp that it is given (FlashAttention-2, algorithm 2)."""
    dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, k, v))
    of_queries, of_keys = (bound.tolist() for bound in bounds)
    for a, b, c, d in zip(of_queries, of_queries[1:], of_keys, of_keys[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, d - c).triu(1).bool(), -torch.inf)
        p = (scores - lse[:, a:b, None]).exp()
        delta = (grad[a:b] * out[a:b]).sum(-1).T[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", grad[a:b], v[c:d]) - delta) * scale
        dq[a:b] += torch.einsum("hqk,khd->qhd", ds, k[c:d])
        dk[c:d] += torch.einsum("hqk,qhd->khd", ds, q[a:b])
        dv[c:d] += torch.einsum("hqk,qhd->khd", p, grad[a:b])
    return dq, dk, dv


def attended(layout: Layout, kernel: str, monkeypatch: pytest.MonkeyPatch) -> list[NDArray[Any]]:
    """Output and gradients of random queries, keys and values, by the kernel named."""
    tokens = layout.segments[-1][1]
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=random).requires_grad_() for heads in (4, 2, 2))
    monkeypatch.setattr(shared_prefix, "_flash", flash_by_hand)
    monkeypatch.setattr(shared_prefix, "_flash_backward", flash_backward_by_hand)
    kernels = {
        "cpu": shared_prefix._OnCpu(layout),
        "cuda": shared_prefix._OnCuda(layout, torch.device("cpu")),
        "masked": None,
    }
    monkeypatch.setattr(shared_prefix, "_kernel", lambda *_: kernels[kernel])
    output = shared_prefix_attention(q, k, v, layout, None, None)
    output.backward(torch.randn(output.shape, generator=random))
    return [output.detach().numpy(), *(tensor.grad.numpy() for tensor in (q, k, v) if tensor.grad is not None)]


@pytest.mark.parametrize("kernel", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout.of([0, 7, 9, 12, 13], ((0, 7, 13),)),
        Layout.of([0, 4, 10, 13, 14, 16, 17, 20, 24], ((4, 10, 14), (14, 16, 20))),
        Layout.of([0, 1, 2, 3, 5], ((0, 1, 3),)),
        Layout.of([0, 300, 396, 494, 526, 626, 640, 768], ((300, 396, 526),)),
    ],
)
def test_every_kernel_computes_what_one_mask_computes(
    layout: Layout, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = (attended(layout, name, monkeypatch) for name in ("masked", kernel))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


# --- when it is off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "fields", "changes", "why"),
    [
        ("llama", {"dropout": 0.1}, {}, "dropout differs between the copies of a prefix"),
        ("llama", {}, {"neftune_alpha": 5.0}, "NEFTune's noise differs between the copies of a prefix"),
        ("llama", {}, {"packing": False}, "examples do not share rows"),
        ("llama", {}, {"attention": "eager"}, "eager attention does not support it"),
        ("gemma2", {}, {}, "eager attention does not support it"),
        ("gpt2", {}, {}, "dropout differs between the copies of a prefix"),
    ],
)
def test_it_is_off_where_it_would_change_what_is_computed_and_that_is_said(
    tmp_path: Path, architecture: str, fields: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    directory = tiny_architecture(tmp_path, architecture)
    model = load(directory, tuning("lora", **fields), **changes)
    assert not model.shares_prefixes
    assert (model.choices["sharedPrefixes"].value, model.choices["sharedPrefixes"].why) == ("off", why)
    with pytest.raises(TrainerError, match=r"Remove training\.sharedPrefixes") as refusal:
        load(directory, tuning("lora", **fields), share_prefixes=True, **changes)
    assert refusal.value.failure_class is FailureClass.BAD_SPEC
    assert why in refusal.value.sentence


def test_gpt2_without_dropout_shares(tmp_path: Path) -> None:
    directory = tiny_architecture(tmp_path, "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = load(directory, tuning("full"))
    assert model.shares_prefixes
    assert_same(model, documents(FAMILIES["one group"]))


def test_an_architecture_that_computes_something_else_keeps_its_documents_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_prefix(*arguments: Any) -> Tensor:
        query, key, value, layout, scaling, window = arguments
        return shared_prefix_attention(query, key, value, Layout(layout.segments, ()), scaling, window)

    directory = tiny_architecture(tmp_path, "llama")
    monkeypatch.setattr("finetune_trainer.model.attention.shared_prefix_attention", without_prefix)
    model = load(directory)
    assert not model.shares_prefixes
    assert "gives different results" in model.choices["sharedPrefixes"].why


@pytest.mark.parametrize("wrong", ["output", "gradients"])
def test_a_device_that_computes_something_else_keeps_documents_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def without_prefix(*arguments: Any) -> Any:
        forgetful = copy(arguments[0])
        forgetful._seen = []
        return original(forgetful, *arguments[1:])

    name = "forward" if wrong == "output" else "backward"
    original = getattr(shared_prefix._OnCpu, name)
    monkeypatch.setattr(shared_prefix._OnCpu, name, without_prefix)
    model = load(tiny_architecture(tmp_path, "llama"))
    assert not model.shares_prefixes
    assert "this device gives different results" in model.choices["sharedPrefixes"].why


def test_a_device_without_the_kernel_keeps_documents_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shared_prefix._OnCpu, "backward")
    model = load(tiny_architecture(tmp_path, "llama"))
    assert not model.shares_prefixes
    assert model.choices["sharedPrefixes"].why.startswith("this device does not support it: ")


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_is_as_exact_as_its_data_type(dtype: torch.dtype, most: float) -> None:
    assert shared_prefix.kernel_deviation(64, dtype, torch.device("cpu")) < most


def test_the_spec_can_switch_it_off(tmp_path: Path) -> None:
    model = load(tiny_architecture(tmp_path, "llama"), share_prefixes=False)
    assert not model.shares_prefixes
    assert model.choices["sharedPrefixes"].why == "set in the spec"


def test_rows_without_shared_prefixes_are_computed_as_ever(tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path), tuning("full"))
    found = documents([(0, (6, 11, 3), 2)])
    batch = collate_packed(found, range(3), [d.target_weight for d in found], PAD, 1, shared_prefixes(found))
    assert batch.shared == ()
    assert torch.equal(model(batch), model(packed(found)))
