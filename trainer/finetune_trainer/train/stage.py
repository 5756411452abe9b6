"""The Train stage: from prepared data to a verified export. Builds the parts, runs the loop, leaves nothing half done.

The order matters: the fence before anything is written, the signal handlers before anything takes long, the
watchdog before the ranks meet, the export durable before any rank ends.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from finetune_api.report import ExportRef, FailureClass
from finetune_api.runconfig import RESUME_VARIABLE
from finetune_api.spec import ResumeFrom
from finetune_api.traits import Scoring
from finetune_trainer.context import RunContext
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.data.order import Order
from finetune_trainer.export import Base, export_model
from finetune_trainer.failures import TrainerError
from finetune_trainer.model.build import CausalModel, load_model
from finetune_trainer.model.device import choose_compile, choose_device, choose_precision
from finetune_trainer.termination import exit_as_hung
from finetune_trainer.train import processes
from finetune_trainer.train.batches import Batcher, Division
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.collective import StepReduction
from finetune_trainer.train.identity import Identity, refuse_other, refuse_other_weights, training_identity
from finetune_trainer.train.interrupt import Interrupt
from finetune_trainer.train.loop import Loop, Plan
from finetune_trainer.train.metrics import MetricsFile
from finetune_trainer.train.monitor import Monitor
from finetune_trainer.train.optimizer import Optimizer
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.state import TrainState
from finetune_trainer.train.tracking import NoTracker, Tracker, WandbTracker
from finetune_trainer.train.validate import Validator
from finetune_trainer.train.watchdog import Watchdog

VALIDATIONS_PER_EPOCH = 4
LONGER_ROWS_PAY = 0.9
"""Share of the computed tokens below which rows become twice as long on a CPU."""
SAMPLED_STEPS = 8
"""Steps from which the report says how much of an epoch examples have in common."""


def run(context: RunContext) -> None:
    """Train to the end, or from the newest checkpoint to the end. Raises TrainerError for all that users can mend."""
    interrupt = Interrupt()
    interrupt.install()
    attempt = context.attempt
    watchdog = Watchdog(
        context.logs, context.rank, context.world_size, attempt.hang_seconds, partial(exit_as_hung, context)
    )
    watchdog.start()
    watchdog.expect("meeting the other ranks", attempt.startup_seconds)
    context.reporter.activity("meeting the other ranks")
    device = choose_device(context.local_rank, context.gpus_per_node)
    patience = 2 * (attempt.startup_seconds + attempt.hang_seconds)
    group = processes.meet(device, context.rank, context.world_size, patience)
    if context.rank == 0:
        context.take_fence()
    watchdog.expect("loading the model", attempt.startup_seconds + attempt.hang_seconds)
    context.reporter.activity("loading the model")
    loop = build_loop(context, device, group, interrupt, watchdog)
    context.reporter.activity("training")
    step = loop.run()
    watchdog.expect("export", attempt.startup_seconds + attempt.hang_seconds, step)
    context.reporter.activity("writing the export")
    export = _export(context, loop.model, step)
    loop.monitor.end(step)
    if context.rank == 0:
        context.reporter.done(export=export)
    dist.barrier(group=group)
    watchdog.stop()
    dist.destroy_process_group()


def build_loop(
    context: RunContext, device: torch.device, group: dist.ProcessGroup, interrupt: Interrupt, watchdog: Watchdog
) -> Loop:
    """The loop with everything in it, resumed from the newest checkpoint. Collective."""
    spec, attempt = context.config.spec, context.attempt
    training, method = spec.training, spec.tuning.method.traits
    manifest = PreparedManifest.read(context.prepared)
    if training.deterministic:
        processes.be_deterministic()

    model = build_model(context, manifest, device)
    optimizer = Optimizer(
        dict(model.trainable),
        betas=(training.betas[0], training.betas[1]),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        b_plus_ratio=spec.tuning.lora.b_plus_ratio if method.low_rank else 1.0,
        world_size=context.world_size,
    )
    train, validation = build_batchers(context, manifest, device, model.shares_prefixes)
    weights = [dataset.weight for dataset in manifest.datasets]
    order = Order.of(train.store.dataset, weights, training.global_batch_size, training.seed)
    if not order.examples:
        raise TrainerError(FailureClass.BAD_DATA, "There are no examples to train on.", "datasets")
    if train.share_prefixes:
        sample = [order.step(step) for step in range(min(order.steps_per_epoch, SAMPLED_STEPS))]
        train, divided = with_longer_rows(train, sample, device, context)
        context.reporter.choose("sharedPrefixes", "on", repetition(divided))
    total = order.total_steps(training.epochs, training.max_steps)
    validator = None
    if validation is not None:
        closed = np.array([dataset.task.traits.scoring is Scoring.CANDIDATES for dataset in manifest.datasets])
        names = [dataset.name for dataset in manifest.datasets]
        validator = Validator(validation, names, closed, training.validation_rows, training.seed, device)
    plan = Plan(
        total=total,
        seed=training.seed,
        rank=context.rank,
        validate_every=training.validate_every or math.ceil(order.steps_per_epoch / VALIDATIONS_PER_EPOCH),
        checkpoint_seconds=60 * spec.checkpoint.every_minutes,
        hang_seconds=attempt.hang_seconds,
        start_seconds=attempt.startup_seconds + attempt.hang_seconds,
        keep_best=training.keep_best,
        watched=training.early_stopping.metric if training.early_stopping else "loss",
        patience=training.early_stopping.patience if training.early_stopping else None,
    )
    identity = training_identity(spec, manifest.model.digest, manifest.digest)
    checkpoints = Checkpoints(
        context.checkpoints,
        group,
        keep=spec.checkpoint.keep,
        attempt=attempt.id,
        identity=identity,
        check_fence=context.check_fence,
    )
    state = resume(context, checkpoints, optimizer, identity, training.resume_from)
    schedule = Schedule(
        kind=training.scheduler.type,
        peak=training.learning_rate or method.default_learning_rate,
        total=total,
        warmup_ratio=training.scheduler.warmup_ratio,
        minimum_ratio=training.min_learning_rate_ratio,
    )
    return Loop(
        plan=plan,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        order=order,
        batcher=train,
        validator=validator,
        checkpoints=checkpoints,
        reduction=StepReduction(device, lag=1 if device.type == "cuda" else 0),
        monitor=build_monitor(context, total, state.step),
        watchdog=watchdog,
        interrupt=interrupt,
        device=device,
        describe=_describer(train.store, manifest),
        state=state,
    )


def build_model(context: RunContext, manifest: PreparedManifest, device: torch.device) -> CausalModel:
    """The model on this rank's device, sharded over the ranks. Collective."""
    spec, choose = context.config.spec, context.reporter.choose
    precision, why_precision = choose_precision(spec.training.precision, device)
    compiled, why_compiled = choose_compile(spec.training.compile, device)
    asked = context.attempt.activation_checkpointing
    checkpointed = bool(spec.training.activation_checkpointing if asked is None else asked)
    spoken = spec.training.activation_checkpointing is not None and not asked
    why_checkpointed = "as the spec says" if spoken else "by the plan, or after memory ran out" if asked else "it fits"
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mesh = processes.build_mesh(device, context.world_size, ranks_per_node, spec.topology.sharding == "hybrid")
    model = load_model(
        directory=manifest.model.directory,
        method=spec.tuning.method,
        tuning=spec.tuning,
        precision=precision,
        device=device,
        mesh=mesh,
        seed=spec.training.seed,
        attention=spec.model.attention,
        packing=spec.training.packing is not False,
        share_prefixes=spec.training.shared_prefixes,
        activation_checkpointing=checkpointed,
        compile=compiled,
        neftune_alpha=spec.training.neftune_alpha,
        label_smoothing=spec.training.label_smoothing,
        adapter_directory=manifest.model.adapter_directory,
        nf4_directory=manifest.model.nf4_directory,
        trust_remote_code=spec.model.trust_remote_code,
    )
    choose("device", device.type, "what is there")
    if spec.training.deterministic:
        choose("deterministic", "on", "as the spec says")
    choose("precision", why_precision.value, why_precision.why)
    choose("compile", why_compiled.value, why_compiled.why)
    choose("activationCheckpointing", "on" if checkpointed else "off", why_checkpointed)
    for name, choice in model.choices.items():
        choose(name, choice.value, choice.why)
    context.reporter.update(origin={**context.reporter.report.origin, **_origin(context, manifest)})
    return model


def build_batchers(
    context: RunContext, manifest: PreparedManifest, device: torch.device, share_prefixes: bool = False
) -> tuple[Batcher, Batcher | None]:
    """The batchers of training and of validation (None where there is nothing to validate on)."""
    spec, choose = context.config.spec, context.reporter.choose
    training, unpacked = spec.training, not spec.tuning.method.traits.can_pack
    packing = not unpacked if training.packing is None else training.packing
    choose("packing", "on" if packing else "off", _why_packed(unpacked, training.packing))
    virtual_tokens = spec.tuning.virtual_tokens

    def batcher(store: DocumentStore) -> Batcher:
        longest = int(store.lengths.max()) + virtual_tokens
        return Batcher(
            store=store,
            loss_weights=np.array([dataset.loss_weight for dataset in manifest.datasets]),
            reduction="example" if training.loss_reduction == "example" else "token",
            micro_batch_tokens=max(longest, context.attempt.micro_batch_tokens or training.max_sequence_length),
            pad_id=manifest.pad_token_id,
            rank=context.rank,
            world_size=context.world_size,
            packing=packing,
            virtual_tokens=virtual_tokens,
            multiple=8 if device.type == "cuda" else 1,
            share_prefixes=share_prefixes,
        )

    stores = DocumentStore(context.prepared / "train"), DocumentStore(context.prepared / "validation")
    if not len(stores[0]):
        raise TrainerError(FailureClass.BAD_DATA, "There are no examples to train on.", "datasets")
    train = batcher(stores[0])
    why = "by the plan" if context.attempt.micro_batch_tokens else "no plan: maxSequenceLength"
    choose("microBatchTokens", train.micro_batch_tokens, f"{why}; the longest example has {stores[0].lengths.max()}")
    if not len(stores[1]):
        context.reporter.warn("There are no validation examples: the last step is exported, not the best one.")
    return train, batcher(stores[1]) if len(stores[1]) else None


def with_longer_rows(
    batcher: Batcher, sample: Sequence[NDArray[np.int64]], device: torch.device, context: RunContext
) -> tuple[Batcher, list[Division]]:
    """The batcher with rows twice as long, if prefixes then repeat so much less that it pays; how it divides `sample`.

    `sample` are the examples of a few steps. Only on a CPU, whose rows are short because longer ones are no faster,
    not because memory is short.
    """
    divided = [batcher.divide(step) for step in sample]
    if device.type != "cpu":
        return batcher, divided
    longer = replace(batcher, micro_batch_tokens=2 * batcher.micro_batch_tokens)
    otherwise = [longer.divide(step) for step in sample]
    before, after = (sum(one.computed_tokens for one in each) for each in (divided, otherwise))
    if after > LONGER_ROWS_PAY * before:
        return batcher, divided
    why = f"twice what it would be: prefixes repeat in fewer rows, and {1 - after / before:.0%} less is computed"
    context.reporter.choose("microBatchTokens", longer.micro_batch_tokens, why)
    return longer, otherwise


def repetition(divided: Sequence[Division]) -> str:
    """How much sharing prefixes saves, from a few steps."""
    logical, computed = sum(one.tokens for one in divided), sum(one.computed_tokens for one in divided)
    return f"{computed / logical:.0%} of the tokens are computed: the others begin examples of one step alike"


def _why_packed(unpacked: bool, asked: bool | None) -> str:
    if unpacked:
        return "packed documents would see each other's virtual tokens"
    return "no padding is computed" if asked is None else "as the spec says"


def resume(
    context: RunContext,
    checkpoints: Checkpoints,
    optimizer: Optimizer,
    identity: Identity,
    resume_from: ResumeFrom | None,
) -> TrainState:
    """Where to go on: the newest whole checkpoint of this job, another job's weights, or the beginning. Collective.

    Raises TrainerError: config-changed, or bad-spec if `resumeFrom` is no whole checkpoint.
    """
    checkpoints.clean()
    found = checkpoints.newest()
    used = f"the one of step {found.manifest.step} is used" if found else "training starts from the beginning"
    for damaged, problem in checkpoints.damaged.items():
        context.reporter.warn(f"Checkpoint {Path(damaged).name} is damaged ({problem}); {used}.")
    if found is not None:
        refuse_other(found.manifest.identity, identity, f"Checkpoint {found.path.name}")
        checkpoints.restore(found, optimizer.tensors())
        context.reporter.update(resumed_from_step=found.manifest.step)
        return found.manifest.state.model_copy(deep=True)
    if resume_from is not None:
        path = _resume_path(context, resume_from)
        found = checkpoints.check(path)
        if found is None:
            sentence = f"{path} is not a whole checkpoint: {checkpoints.damaged[str(path)]}."
            raise TrainerError(FailureClass.BAD_SPEC, sentence, "training.resumeFrom.path")
        refuse_other_weights(found.manifest.identity, identity, f"Checkpoint {path}")
        checkpoints.restore(found, optimizer.tensors())
    return TrainState()


def _resume_path(context: RunContext, resume_from: ResumeFrom) -> Path:
    mounted = os.environ.get(RESUME_VARIABLE)
    if mounted and not Path(resume_from.path).is_absolute():
        return Path(mounted) / resume_from.path
    return context.resolve_source(resume_from.path, "training.resumeFrom.path")


def build_monitor(context: RunContext, total: int, step: int) -> Monitor:
    """Curves, report and W&B; the curves go on after `step`."""
    metrics = None
    if context.rank == 0:
        metrics = MetricsFile(context.metrics_file)
        metrics.rewind(step)
    return Monitor(
        reporter=context.reporter,
        metrics=metrics,
        attempt=context.attempt.number,
        total=total,
        tracker=build_tracker(context),
    )


def build_tracker(context: RunContext) -> Tracker:
    """W&B on rank 0, if the spec asks for it."""
    wandb = context.config.spec.tracking.wandb
    if wandb is None or wandb.mode == "disabled" or context.rank != 0:
        return NoTracker()
    key = context.token("wandb")
    if wandb.mode == "online" and key is None:
        context.reporter.warn("There is no W&B key (credentials.wandb, locally WANDB_API_KEY): nothing is tracked.")
        return NoTracker()
    job = context.config.job
    return WandbTracker(
        project=wandb.project,
        entity=wandb.entity,
        mode=wandb.mode,
        run_id=job.uid,
        name=f"{job.namespace}/{job.name}",
        config=context.config.spec.to_wire(),
        directory=context.run / "wandb",
        api_key=key,
    )


def _export(context: RunContext, model: CausalModel, step: int) -> ExportRef:
    """Write `export/` and read it again. Collective; returns when it is durable."""
    manifest = PreparedManifest.read(context.prepared)
    publish = context.config.spec.publish
    exported = export_model(
        model,
        directory=context.export,
        base=Base(Path(manifest.model.directory), manifest.model.source, manifest.model.commit or None),
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


def _describer(store: DocumentStore, manifest: PreparedManifest) -> Callable[[int], str]:
    names = {dataset.index: dataset.name for dataset in manifest.datasets}

    def describe(index: int) -> str:
        document = store[index]
        row = f"row {document.row}" if document.row >= 0 else f"document {index}"
        return f"{names.get(document.dataset, '?')} {row}"

    return describe


def _origin(context: RunContext, manifest: PreparedManifest) -> dict[str, object]:
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "finetune-operator")
    versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    base = f"{manifest.model.source}@{manifest.model.commit or manifest.model.digest}"
    return {
        "model": base,
        "datasets": {dataset.name: dataset.source for dataset in manifest.datasets},
        "seed": context.config.spec.training.seed,
        "versions": versions,
        "worldSize": context.world_size,
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
