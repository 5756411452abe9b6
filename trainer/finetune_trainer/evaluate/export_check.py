"""Whether the export, as its users load it, computes what was trained: the same loss on the same few documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from finetune_api.base import Stage
from finetune_api.report import ExportProbe, FailureClass
from finetune_trainer.context import RunContext
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.evaluate.likelihood import Budget, TargetSequence, sequence_scores
from finetune_trainer.evaluate.models import ModelPair
from finetune_trainer.failures import TrainerError
from finetune_trainer.reports import newest_done, read_reports

CHOICE = "exportCheck"
TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of the losses, in nats per token (relative where the loss is above 1), by the less exact of the
types in which the products are computed and whole weights are stored."""
TOLERANCE_AFTER_4_BITS = 0.5
"""A QLoRA adapter is trained on 4-bit weights and merged into those that these were rounded from."""


def check_export(context: RunContext, pair: ModelPair, model: Any, digest: str, budget: Budget) -> None:
    """Compare the loaded export's loss with the one that Train measured, and report both.

    digest: the export's. Raises TrainerError (export-differs), which keeps the model from being published.
    """
    report = newest_done(read_reports(context.reports), Stage.TRAIN)
    probe = report.probe if report is not None and report.export is not None else None
    if probe is None or not probe.tokens or (report and report.export and report.export.digest != digest):
        context.reporter.choose(CHOICE, "not done", "the report of Train has no loss to compare with")
        return
    loss, tolerance = _loss(context.prepared / probe.split, probe, model, budget), _tolerance(pair)
    allowed = tolerance * max(1.0, probe.loss)
    both = f"{loss:.5f}, trained {probe.loss:.5f}, on {probe.tokens:,} tokens of {len(probe.documents)} documents"
    if not abs(loss - probe.loss) <= allowed:
        raise TrainerError(
            FailureClass.EXPORT_DIFFERS,
            f"The export, loaded by transformers, does not compute what was trained: its loss is {both}; a difference "
            f"of {allowed:.3g} is allowed. Nothing will be published. Please report the model's architecture.",
            "publish.format",
        )
    context.reporter.choose(CHOICE, "equal", f"loss of the reloaded export {both}; {allowed:.3g} is allowed")


def _loss(documents: Path, probe: ExportProbe, model: Any, budget: Budget) -> float:
    store = DocumentStore(documents)
    sequences = []
    for index in probe.documents:
        ids = tuple(store[index].ids.tolist())
        sequences.append(TargetSequence(ids, tuple(range(len(ids) - 1)), ids[1:]))
    return -sum(score.sum for score in sequence_scores(model, sequences, budget)) / probe.tokens


def _tolerance(pair: ModelPair) -> float:
    if pair.is_adapter:
        return TOLERANCE[pair.dtype]
    if pair.method.traits.four_bit:
        return TOLERANCE_AFTER_4_BITS
    stored = AutoConfig.from_pretrained(pair.export, trust_remote_code=pair.trust_remote_code).dtype
    return max(TOLERANCE[pair.dtype], TOLERANCE.get(stored, 0.0))
