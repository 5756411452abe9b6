"""A stage's next attempt: planned, made smaller after an out-of-memory, entered into the history."""

from __future__ import annotations

from finetune_api.base import Stage
from finetune_api.report import FailureClass
from finetune_api.status import AttemptRecord
from finetune_operator.decision import attempts, progress
from finetune_operator.decision.conditions import Verdict
from finetune_operator.decision.draft import Draft, fail, starting
from finetune_operator.decision.failure_policy import Footprint, camel, shrink


def enter(draft: Draft, stage: Stage) -> Verdict:
    """Record the stage's next attempt, unless it is known not to fit."""
    status = draft.status
    if stage is Stage.TRAIN:
        refused = _plan(draft)
        if refused is not None:
            return refused
    footprint = _footprint(draft, stage)
    attempts.open_next(status, stage, footprint, draft.now)
    status.progress, status.progress_text, status.eta_text, status.activity = None, "", "", ""
    return starting(stage)


def _plan(draft: Draft) -> Verdict | None:
    """Make the memory plan from what Prepare found; a plan that does not fit ends the job before a GPU is taken."""
    status, seen = draft.status, draft.seen
    report = attempts.report_of(seen, Stage.PREPARE, status.attempts_started.get(Stage.PREPARE, 0))
    if draft.planner is not None and report is not None and report.model is not None and report.lengths is not None:
        status.plan = draft.planner(seen.spec, report.model, report.lengths)
    if status.plan is None:
        return None
    status.warnings = progress.merged_warnings(status.warnings, status.plan.warnings)
    if status.plan.fits is not False:
        return None
    advice = " ".join(status.plan.warnings)
    return fail(draft, camel(FailureClass.DOES_NOT_FIT), f"The training does not fit. {advice}".strip())


def _footprint(draft: Draft, stage: Stage) -> Footprint | None:
    """What earlier out-of-memories of this stage have left."""
    last = attempts.latest(draft.status, stage)
    if last is None or (last.micro_batch_tokens is None and last.activation_checkpointing is None):
        plan = draft.status.plan
        first = None
        if plan is not None and stage is Stage.TRAIN:
            first = Footprint(plan.micro_batch_tokens, plan.activation_checkpointing)
        if last is None or last.reason != FailureClass.CUDA_OOM:
            return first
        return shrunk(draft, last)
    if last.reason == FailureClass.CUDA_OOM:
        return shrunk(draft, last)
    return Footprint(last.micro_batch_tokens, bool(last.activation_checkpointing))


def shrunk(draft: Draft, last: AttemptRecord) -> Footprint | None:
    status, seen = draft.status, draft.seen
    prepared = attempts.report_of(seen, Stage.PREPARE, status.attempts_started.get(Stage.PREPARE, 0))
    longest = prepared.lengths.longest if prepared is not None and prepared.lengths is not None else None
    tokens = last.micro_batch_tokens or (status.plan.micro_batch_tokens if status.plan is not None else None)
    always = bool(seen.spec.training.activation_checkpointing)
    now = Footprint(tokens, always or bool(last.activation_checkpointing))
    return shrink(now, longest, can_checkpoint=last.stage is Stage.TRAIN)
