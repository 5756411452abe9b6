"""Cross entropy of labelled positions only, in chunks, so that no [tokens, vocabulary] tensor ever exists."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

CHUNK_ELEMENTS = 2**25
"""Logits (positions times vocabulary) of one chunk: 128 MiB in float32, about four such tensors at the peak."""

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
        logits = head(part).float()
        return functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing), logits.argmax(
            -1
        ) == wanted

    if len(target) <= size:
        return chunk(labelled, target)
    parts = [
        checkpoint(chunk, part, wanted, use_reentrant=False)
        for part, wanted in zip(torch.split(labelled, size), torch.split(target, size), strict=True)
    ]
    losses, correct = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(correct)


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
