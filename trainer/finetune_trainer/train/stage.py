"""The Train stage: how a training run is put together, from prepared data to a verified export.

The order matters: the fence before anything is written, the signal handlers before anything takes long, the
watchdog before the ranks meet, the export durable before any rank ends.
"""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from finetune_api.report import Digests, ExportProbe, ExportRef, FailureClass
from finetune_api.runconfig import RESUME_VARIABLE, reproduced
from finetune_api.traits import Scoring
from finetune_trainer.context import RunContext
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.data.order import ExampleSampler
from finetune_trainer.export import Base, export_model
from finetune_trainer.failures import TrainerError
from finetune_trainer.model.build import CausalModel
from finetune_trainer.model.device import choose_device, row_multiple
from finetune_trainer.termination import exit_as_hung
from finetune_trainer.train import probe, processes
from finetune_trainer.train.batches import MicroBatcher
from finetune_trainer.train.builders import build_batchers, build_model, fit_rows_to_prefixes
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.collective import StepReduction
from finetune_trainer.train.identity import Identity, refuse_other, refuse_other_weights, training_identity
from finetune_trainer.train.interrupt import Interrupt
from finetune_trainer.train.loop import Loop, LoopSettings
from finetune_trainer.train.metrics import MetricsFile
from finetune_trainer.train.monitor import Monitor
from finetune_trainer.train.objective import CrossEntropy, Objective
from finetune_trainer.train.optimizer import Optimizer
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.state import TrainState
from finetune_trainer.train.tracking import NoTracker, Tracker, WandbTracker
from finetune_trainer.train.validate import Validator
from finetune_trainer.train.watchdog import Watchdog
from finetune_trainer.versions import versions

VALIDATIONS_PER_EPOCH = 4
SAMPLED_STEPS = 8
"""Steps that are sampled for what the examples of a step have in common."""


def run(context: RunContext) -> None:
    """Train to the end, or from the newest checkpoint to the end. Raises TrainerError for whatever users can fix."""
    interrupt = Interrupt()
    interrupt.install()
    attempt = context.attempt
    on_hang = partial(exit_as_hung, context)
    watchdog = Watchdog(context.logs, context.rank, context.world_size, attempt.hang_seconds, on_hang)
    watchdog.start()
    watchdog.expect("waiting for the other ranks", attempt.startup_seconds)
    context.reporter.activity("waiting for the other ranks")
    device = choose_device(context.local_rank, context.gpus_per_node)
    timeout = 2 * (attempt.startup_seconds + attempt.hang_seconds)
    group = processes.init_distributed(device, context.rank, context.world_size, timeout)
    if context.rank == 0:
        context.take_fence()
    watchdog.expect("loading the model", attempt.startup_seconds + attempt.hang_seconds)
    context.reporter.activity("loading the model")
    loop = build_loop(context, device, group, interrupt, watchdog)
    context.reporter.activity("training")
    step = loop.run()
    watchdog.expect("writing the export", attempt.startup_seconds + attempt.hang_seconds, step)
    context.reporter.activity("writing the export")
    export = _export(context, loop.model, step)
    watchdog.expect("measuring the trained model", attempt.startup_seconds + attempt.hang_seconds, step)
    measured = _probe(context, loop)
    loop.monitor.end(step)
    if context.rank == 0:
        context.reporter.done(export=export, probe=measured, digests=Digests(export=export.digest))
    dist.barrier(group=group)
    watchdog.stop()
    dist.destroy_process_group()


def build_loop(
    context: RunContext, device: torch.device, group: dist.ProcessGroup, interrupt: Interrupt, watchdog: Watchdog
) -> Loop:
    """Put the run together, resumed from the newest checkpoint, and report what was chosen. Collective."""
    spec, attempt, reporter = context.config.spec, context.attempt, context.reporter
    training, method = spec.training, spec.tuning.method.traits
    manifest = PreparedManifest.read(context.prepared, context.attempt.digests.prepared)
    if training.deterministic:
        processes.set_determinism()

    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mesh = processes.build_mesh(device, context.world_size, ranks_per_node, spec.topology.sharding == "hybrid")
    model, choices = build_model(spec, manifest.model, device, mesh, attempt.activation_checkpointing)
    reporter.choose_all(choices)
    reporter.update(origin={**reporter.report.origin, **_origin(context, manifest)})
    optimizer = Optimizer(
        dict(model.trainable),
        betas=(training.betas[0], training.betas[1]),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        b_plus_ratio=spec.tuning.lora.b_plus_ratio if method.low_rank else 1.0,
        world_size=context.world_size,
    )

    objective = CrossEntropy()
    sampler, batcher, validator = _build_data(context, manifest, device, objective, model)
    total = training.total_steps(sampler.examples)
    identity = training_identity(spec, manifest.model.digest, manifest.digest)
    checkpoints = Checkpoints(
        context.checkpoints,
        group,
        keep=spec.checkpoint.keep,
        attempt=attempt.id,
        identity=identity,
        check_fence=context.check_fence,
    )
    state = resume(context, checkpoints, optimizer, identity)
    metrics = MetricsFile(context.metrics_file) if context.rank == 0 else None
    if metrics is not None:
        metrics.rewind(state.step)
    return Loop(
        settings=LoopSettings(
            total=total,
            seed=training.seed,
            rank=context.rank,
            validate_every=training.validate_every or math.ceil(sampler.steps_per_epoch / VALIDATIONS_PER_EPOCH),
            checkpoint_seconds=60 * spec.checkpoint.every_minutes,
            hang_seconds=attempt.hang_seconds,
            start_seconds=attempt.startup_seconds + attempt.hang_seconds,
            keep_best=training.keep_best,
            watched=training.early_stopping.metric if training.early_stopping else "loss",
            patience=training.early_stopping.patience if training.early_stopping else None,
        ),
        model=model,
        objective=objective,
        optimizer=optimizer,
        schedule=Schedule(
            kind=training.scheduler.type,
            peak=training.learning_rate or method.default_learning_rate,
            total=total,
            warmup_ratio=training.scheduler.warmup_ratio,
            minimum_ratio=training.min_learning_rate_ratio,
        ),
        sampler=sampler,
        batcher=batcher,
        validator=validator,
        checkpoints=checkpoints,
        reduction=StepReduction(device, lag=1 if device.type == "cuda" else 0),
        monitor=Monitor(reporter, metrics, attempt.number, total, _build_tracker(context)),
        watchdog=watchdog,
        interrupt=interrupt,
        device=device,
        describe=partial(_describe_example, batcher.store, manifest),
        state=state,
    )


def _build_data(
    context: RunContext, manifest: PreparedManifest, device: torch.device, objective: Objective, model: CausalModel
) -> tuple[ExampleSampler, MicroBatcher, Validator | None]:
    """What makes examples into micro-batches, and what validates (None if there is nothing to validate on)."""
    spec, reporter = context.config.spec, context.reporter
    training = spec.training
    documents, held_out = (DocumentStore(context.prepared / split) for split in ("train", "validation"))
    weights = [dataset.weight for dataset in manifest.datasets]
    sampler = ExampleSampler.of(documents.dataset, weights, training.global_batch_size, training.seed)
    if not sampler.examples:
        raise TrainerError(FailureClass.BAD_DATA, "There are no examples to train on.", "datasets")
    (batcher, validation), choices = build_batchers(
        documents,
        held_out,
        manifest,
        spec,
        planned_tokens=context.attempt.micro_batch_tokens,
        rank=context.rank,
        world_size=context.world_size,
        multiple=row_multiple(device),
        packing=model.packs,
        share_prefixes=model.shares_prefixes,
    )
    reporter.choose_all(choices | model.choices)
    if batcher.share_prefixes:
        sample = [sampler.step(step) for step in range(min(sampler.steps_per_epoch, SAMPLED_STEPS))]
        batcher, choices = fit_rows_to_prefixes(batcher, sample, device)
        reporter.choose_all(choices)
    if validation is None:
        reporter.warn("There are no validation examples, so the last step is exported instead of the best one.")
        return sampler, batcher, None
    closed = np.array([dataset.task.traits.scoring is Scoring.CANDIDATES for dataset in manifest.datasets])
    names = [dataset.name for dataset in manifest.datasets]
    validator = Validator(validation, objective, names, closed, training.validation_rows, training.seed, device)
    return sampler, batcher, validator


def resume(context: RunContext, checkpoints: Checkpoints, optimizer: Optimizer, identity: Identity) -> TrainState:
    """Resume from the newest valid checkpoint of this job, or start from another job's weights, or anew. Collective.

    Raises TrainerError: config-changed, or bad-spec if `resumeFrom` names no valid checkpoint.
    """
    checkpoints.clean()
    newest = checkpoints.newest()
    instead = f"resuming from step {newest.manifest.step}" if newest else "starting from the beginning"
    for damaged, problem in checkpoints.damaged.items():
        context.reporter.warn(f"Checkpoint {Path(damaged).name} is damaged ({problem}); {instead}.")
    if newest is not None:
        refuse_other(newest.manifest.identity, identity, f"Checkpoint {newest.path.name}")
        checkpoints.restore(newest, optimizer.tensors())
        context.reporter.update(resumed_from_step=newest.manifest.step)
        return newest.manifest.state.model_copy(deep=True)
    if resume_from := context.config.spec.training.resume_from:
        mounted, path = os.environ.get(RESUME_VARIABLE), Path(resume_from.path)
        if mounted and not path.is_absolute():
            path = Path(mounted) / path
        else:
            path = context.resolve_source(resume_from.path, "training.resumeFrom.path")
        start = checkpoints.check(path)
        if start is None:
            sentence = f"{path} is not a valid checkpoint: {checkpoints.damaged[str(path)]}."
            raise TrainerError(FailureClass.BAD_SPEC, sentence, "training.resumeFrom.path")
        refuse_other_weights(start.manifest.identity, identity, f"Checkpoint {path}")
        checkpoints.restore(start, optimizer.tensors())
    return TrainState()


def _build_tracker(context: RunContext) -> Tracker:
    """W&B on rank 0, if the spec asks for it."""
    wandb = context.config.spec.tracking.wandb
    if wandb is None or wandb.mode == "disabled" or context.rank != 0:
        return NoTracker()
    key = context.token("wandb")
    if wandb.mode == "online" and key is None:
        context.reporter.warn("W&B is off: there is no API key (credentials.wandb, or WANDB_API_KEY on this machine).")
        return NoTracker()
    job = context.config.job
    return WandbTracker(
        project=wandb.project,
        entity=wandb.entity,
        mode=wandb.mode,
        run_id=job.uid,
        name=f"{job.namespace}/{job.name}",
        config=reproduced(context.config.spec),
        directory=context.run / "wandb",
        api_key=key,
    )


def _export(context: RunContext, model: CausalModel, step: int) -> ExportRef:
    """Write `export/` and read it back. Collective; returns when it is durable."""
    manifest = PreparedManifest.read(context.prepared, context.attempt.digests.prepared)
    publish, trusted = context.config.spec.publish, context.config.spec.model.trust_remote_code
    exported = export_model(
        model,
        directory=context.export,
        base=Base(Path(manifest.model.directory), manifest.model.source, manifest.model.commit or None, trusted),
        tokenizer=context.prepared / manifest.tokenizer,
        format=publish.format if publish else "adapter",
        end_token_ids=manifest.end_token_ids,
        pad_token_id=manifest.pad_token_id,
        check_fence=context.check_fence,
    )
    return ExportRef(
        path=context.export.name,
        digest=exported.digest,
        format=exported.format,
        size_bytes=exported.size_bytes,
        step=step,
    )


def _probe(context: RunContext, loop: Loop) -> ExportProbe:
    """What Evaluate compares the export with, on documents that were not trained on where there are any. Collective."""
    manifest = PreparedManifest.read(context.prepared, context.attempt.digests.prepared)
    split: Literal["train", "validation"] = "validation" if manifest.validation.documents else "train"
    return probe.measure(loop.model, DocumentStore(context.prepared / split), split, manifest.pad_token_id, loop.device)


def _describe_example(store: DocumentStore, manifest: PreparedManifest, index: int) -> str:
    document = store[index]
    names = {dataset.index: dataset.name for dataset in manifest.datasets}
    row = f"row {document.row}" if document.row >= 0 else f"document {index}"
    return f"{names.get(document.dataset, '?')} {row}"


def _origin(context: RunContext, manifest: PreparedManifest) -> dict[str, object]:
    return {
        "model": f"{manifest.model.source}@{manifest.model.commit or manifest.model.digest}",
        "datasets": {dataset.name: dataset.source for dataset in manifest.datasets},
        "seed": context.config.spec.training.seed,
        "versions": versions(),
        "worldSize": context.world_size,
    }
