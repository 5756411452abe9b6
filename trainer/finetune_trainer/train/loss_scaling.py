"""The share of each labelled token in the step's loss, exact over ranks and micro-batches. Pure.

The denominators run over the whole step's examples, which every rank knows: so the loss is a plain sum
over ranks, and gradients that are summed over ranks (model/sharding.py) need no factor. The objective multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Reduction = Literal["token", "example"]


def document_scales(weight_sums: Float64, loss_weights: Float64, reduction: Reduction) -> Float64:
    """Factor float64[n] on the target weights of each of a step's n documents.

    `weight_sums` are the sums W_d of the documents' target weights, `loss_weights` the factors l_d of their datasets.
    token:   loss = sum_d l_d sum_t w_t ce_t / sum_d W_d
    example: loss = mean over the documents with W_d > 0 of l_d (sum_t w_t ce_t) / W_d
    A document without labels has factor 0.
    """
    labelled = weight_sums > 0
    if not labelled.any():
        return np.zeros_like(weight_sums)
    if reduction == "token":
        return np.where(labelled, loss_weights / weight_sums[labelled].sum(), 0.0)
    return np.where(labelled, loss_weights / (np.where(labelled, weight_sums, 1.0) * labelled.sum()), 0.0)


def target_shares(target_weights: Sequence[Float32], loss_weights: Float64, reduction: Reduction) -> list[Float32]:
    """Share float32[l_d] of every target of every document of a step in its loss."""
    sums = np.array([weights.sum(dtype=np.float64) for weights in target_weights])
    scales = document_scales(sums, loss_weights, reduction)
    return [(weights * scale).astype(np.float32) for weights, scale in zip(target_weights, scales, strict=True)]
