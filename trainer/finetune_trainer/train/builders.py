"""Builds the parts of a training run that depend on device and data, each with the choices made for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh

from finetune_api.report import Choice
from finetune_api.spec import FineTuneJobSpec, Training
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.manifest import PreparedManifest, PreparedModel
from finetune_trainer.model.build import CausalModel, load_model
from finetune_trainer.model.device import choose_compile, choose_precision
from finetune_trainer.train.batches import MicroBatcher, RowAssignment

Choices = dict[str, Choice]

LONGER_ROWS_PAY = 0.9
"""On a CPU, rows become twice as long where that leaves at most this share of the computed tokens."""


def build_model(
    spec: FineTuneJobSpec,
    prepared: PreparedModel,
    device: torch.device,
    mesh: DeviceMesh | None,
    forced_checkpointing: bool | None,
) -> tuple[CausalModel, Choices]:
    """The model on this rank's device, sharded over the mesh. Collective.

    `forced_checkpointing` is the attempt's answer to activation checkpointing, which replaces the spec's unless None.
    """
    training = spec.training
    precision, why_precision = choose_precision(training.precision, device)
    compiled, why_compiled = choose_compile(training.compile, device)
    checkpointed = bool(training.activation_checkpointing if forced_checkpointing is None else forced_checkpointing)
    model = load_model(
        directory=prepared.directory,
        method=spec.tuning.method,
        tuning=spec.tuning,
        precision=precision,
        device=device,
        mesh=mesh,
        seed=training.seed,
        attention=spec.model.attention,
        packing=training.packing,
        share_prefixes=training.shared_prefixes,
        activation_checkpointing=checkpointed,
        compile=compiled,
        neftune_alpha=training.neftune_alpha,
        label_smoothing=training.label_smoothing,
        adapter_directory=prepared.adapter_directory,
        nf4_directory=prepared.nf4_directory,
        trust_remote_code=spec.model.trust_remote_code,
    )
    choices = {"device": Choice(value=device.type, why=f"the node has {'GPUs' if device.type == 'cuda' else 'no GPU'}")}
    if training.deterministic:
        choices["deterministic"] = Choice(value="on", why="set in the spec")
    choices |= {"precision": why_precision, "compile": why_compiled}
    choices["activationCheckpointing"] = _choose_checkpointing(training, checkpointed, forced_checkpointing)
    return model, choices | model.choices


def _choose_checkpointing(training: Training, checkpointed: bool, forced: bool | None) -> Choice:
    if forced:
        return Choice(value="on", why="required by the memory plan, or after running out of memory")
    why = "set in the spec" if training.activation_checkpointing is not None else "activations fit into memory"
    return Choice(value="on" if checkpointed else "off", why=why)


def build_batchers(
    train: DocumentStore,
    validation: DocumentStore,
    manifest: PreparedManifest,
    spec: FineTuneJobSpec,
    *,
    planned_tokens: int | None,
    rank: int,
    world_size: int,
    multiple: int,
    packing: bool,
    share_prefixes: bool,
) -> tuple[tuple[MicroBatcher, MicroBatcher | None], Choices]:
    """The batchers of training and of validation (None if there is nothing to validate on).

    `planned_tokens` is the plan's size of a micro-batch; rows are padded to a multiple of `multiple` tokens.
    """
    training, unpacked = spec.training, not spec.tuning.method.traits.can_pack
    virtual_tokens = spec.tuning.virtual_tokens

    def batcher(store: DocumentStore) -> MicroBatcher:
        longest = int(store.lengths.max()) + virtual_tokens
        return MicroBatcher(
            store=store,
            loss_weights=np.array([dataset.loss_weight for dataset in manifest.datasets]),
            reduction="example" if training.loss_reduction == "example" else "token",
            micro_batch_tokens=max(longest, planned_tokens or training.max_sequence_length),
            pad_id=manifest.pad_token_id,
            rank=rank,
            world_size=world_size,
            packing=packing,
            virtual_tokens=virtual_tokens,
            multiple=multiple,
            share_prefixes=share_prefixes,
        )

    batchers = batcher(train), batcher(validation) if len(validation) else None
    origin = "from the memory plan" if planned_tokens else "no memory plan, so training.maxSequenceLength"
    why_tokens = f"{origin}; the longest example has {train.lengths.max():,} tokens"
    return batchers, {
        "packing": Choice(value="on" if packing else "off", why=_why_packed(unpacked, training.packing)),
        "microBatchTokens": Choice(value=str(batchers[0].micro_batch_tokens), why=why_tokens),
    }


def _why_packed(unpacked: bool, requested: bool | None) -> str:
    if unpacked:
        return "packed examples would attend to each other's virtual tokens"
    return "avoids padding" if requested is None else "set in the spec"


def fit_rows_to_prefixes(
    batcher: MicroBatcher, sample: Sequence[NDArray[np.int64]], device: torch.device
) -> tuple[MicroBatcher, Choices]:
    """The batcher with rows twice as long, if fewer repeated prefixes make that worthwhile; and what sharing saves.

    `sample` are the examples of a few steps. Rows are lengthened on a CPU only, where they are short because longer
    ones are no faster, not because memory is short.
    """
    assignments, choices = [batcher.assign_rows(examples) for examples in sample], {}
    if device.type == "cpu":
        longer = replace(batcher, micro_batch_tokens=2 * batcher.micro_batch_tokens)
        with_longer = [longer.assign_rows(examples) for examples in sample]
        before, after = _computed(assignments), _computed(with_longer)
        if after <= LONGER_ROWS_PAY * before:
            batcher, assignments = longer, with_longer
            why = f"doubled, since prefixes repeat in fewer rows: {1 - after / before:.0%} fewer tokens are computed"
            choices["microBatchTokens"] = Choice(value=str(longer.micro_batch_tokens), why=why)
    share = _computed(assignments) / sum(assignment.tokens for assignment in assignments)
    why = f"{share:.0%} of the tokens are computed; the rest are prefixes that examples of one step have in common"
    return batcher, choices | {"sharedPrefixes": Choice(value="on", why=why)}


def _computed(assignments: Sequence[RowAssignment]) -> int:
    return sum(assignment.computed_tokens for assignment in assignments)
