"""Cross entropy of labelled positions only, in chunks, so that no [tokens, vocabulary] tensor ever exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

CHUNK_ELEMENTS = 2**25
"""Logits (positions times vocabulary) of one chunk: with their gradient 128 MiB in bfloat16, 256 in float32."""
BLOCK_ELEMENTS = 2**20
"""Logits that are looked at in float32 at a time: they stay in a CPU's cache."""
CUDA_BLOCK_ELEMENTS = 2**22
"""The same on a GPU, which is idle between small kernels."""

Head = Callable[[Tensor], Tensor]


def target_losses(
    hidden: Tensor, position: Tensor, target: Tensor, head: Head, vocabulary: int, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy and correctness of each target.

    hidden [N, H], position int64[L] into it, target int64[L] -> float32[L], bool[L] (is the target the most
    likely token). Smoothing e: (1 - e) * CE(target) + e * mean over the vocabulary of CE. Chunks are recomputed in
    the backward pass, except where there is only one. L = 0 gives empty tensors that are connected to the graph.
    """
    labelled = hidden.index_select(0, position)
    size = max(1, CHUNK_ELEMENTS // vocabulary)

    def chunk(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _CrossEntropy.apply(head(part), wanted, smoothing)
        return found

    if len(target) <= size:
        return chunk(labelled, target)
    parts = [
        checkpoint(chunk, part, wanted, use_reentrant=False)
        for part, wanted in zip(torch.split(labelled, size), torch.split(target, size), strict=True)
    ]
    losses, correct = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(correct)


class _CrossEntropy(torch.autograd.Function):
    """Computed in float32 whatever the logits' type, but a block of rows at a time.

    What is kept for the gradient are the logits as they are and one number per row; PyTorch's own would keep the
    logits' logarithmic softmax too, and has it, the logits and the gradient in float32 at the same time.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """logits [L, V], target int64[L] -> losses float32[L], correct bool[L]."""
        norm = logits.new_empty(len(target), dtype=torch.float32)
        losses, correct = torch.empty_like(norm), torch.empty_like(norm, dtype=torch.bool)
        for rows in _blocks(logits):
            block, wanted = logits[rows].float(), target[rows, None]
            norm[rows] = block.logsumexp(-1)
            expected = block.gather(1, wanted).squeeze(1)
            if smoothing:
                expected = (1 - smoothing) * expected + smoothing * block.mean(-1)
            losses[rows] = norm[rows] - expected
            correct[rows] = block.argmax(-1, keepdim=True).eq(wanted).squeeze(1)
        ctx.save_for_backward(logits, target, norm)
        ctx.smoothing = smoothing  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """Softmax less what was wanted, times the gradient float32[L] of each loss."""
        logits, target, norm = ctx.saved_tensors  # type: ignore[attr-defined]
        smoothing: float = ctx.smoothing  # type: ignore[attr-defined]
        result = torch.empty_like(logits)
        for rows in _blocks(logits):
            block = (logits[rows] - norm[rows, None]).exp_()  # in float32, which is the other's type
            if smoothing:
                block.sub_(smoothing / block.shape[1])
            block.scatter_add_(1, target[rows, None], torch.full_like(norm[rows, None], smoothing - 1))
            result[rows] = block.mul_(gradient[rows, None])
        return result, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    """The rows of [L, V], some at a time."""
    elements = CUDA_BLOCK_ELEMENTS if logits.is_cuda else BLOCK_ELEMENTS
    size = max(1, elements // logits.shape[1])
    return (slice(first, first + size) for first in range(0, len(logits), size))


def logits_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What the architecture does to the output of its head: Gemma's cap, Cohere's and Granite's scale."""
    cap = getattr(config, "final_logit_softcapping", None)
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)

    def transform(logits: Tensor) -> Tensor:
        if factor != 1.0:
            logits = logits * factor
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform
