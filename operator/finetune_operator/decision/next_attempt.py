"""A stage's next attempt: what it waits for, its memory plan and footprint, its record in the history."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.base import Stage
from finetune_api.report import FailureClass, LengthFacts, ModelFacts
from finetune_api.status import AttemptRecord, Phase
from finetune_operator.decision import attempts, conditions, deadlines, progress
from finetune_operator.decision.conditions import MISSING, JobCondition, State, starting, waiting
from finetune_operator.decision.failure_policy import Footprint, condition_reason, shrink
from finetune_operator.decision.model import RETRY_ANNOTATION, Observation, PlanFailure, Planner
from finetune_operator.decision.status_draft import StatusDraft


def blocked_by(draft: StatusDraft, stage: Stage) -> JobCondition | None:
    """What keeps the stage's next attempt from being started, if anything: the user, something missing, a backoff."""
    for check in (_wait_for_user, _wait_for_missing, _wait_for_backoff):
        condition = check(draft, stage)
        if condition is not None:
            return condition
    draft.status.waiting_since = None
    return None


def _wait_for_user(draft: StatusDraft, stage: Stage) -> JobCondition | None:
    status = draft.status
    if not status.credentials_seen:
        return None
    record = attempts.latest(status, stage)
    if record is None or status.credentials_seen != draft.credentials:
        status.credentials_seen = ""
        return None
    reason = "WaitingForCredentials" if record.reason == FailureClass.NO_ACCESS else "WaitingForUser"
    advice = f"Resumes when the Secret changes or the annotation {RETRY_ANNOTATION} gets a new value."
    return _wait_until_deadline(draft, record.message) or waiting(reason, f"{record.message} {advice}")


def _wait_for_missing(draft: StatusDraft, stage: Stage) -> JobCondition | None:
    awaited = (missing for missing in draft.observation.missing if missing.kind in ("Secret", "PersistentVolumeClaim"))
    missing = next(awaited, None)
    if missing is None:
        return None
    return _wait_until_deadline(draft, missing.sentence) or waiting(MISSING[missing.kind], missing.sentence)


def _wait_until_deadline(draft: StatusDraft, sentence: str) -> JobCondition | None:
    """Wait for the user as long as the job's deadline allows, and fail then."""
    draft.status.waiting_since = draft.status.waiting_since or draft.now
    deadline = deadlines.user_deadline(draft.status, draft.spec)
    if deadline is not None and draft.now >= deadline:
        return draft.fail("DeadlineExceeded", f"Deadline exceeded while waiting for you: {sentence}")
    draft.requeue_by(deadline)
    return None


def _wait_for_backoff(draft: StatusDraft, stage: Stage) -> JobCondition | None:
    retry_at = draft.status.retry_at
    if retry_at is None or draft.now >= retry_at:
        return None
    draft.requeue_by(retry_at)
    record = attempts.latest(draft.status, stage)
    failure = f" Last failure: {record.message}" if record is not None else ""
    message = f"Retrying {stage} after a backoff.{failure}"
    return JobCondition(State.PROGRESSING, "BackingOff", message, Phase.BACKING_OFF)


def plan_inputs(observation: Observation) -> tuple[ModelFacts, LengthFacts] | None:
    """What the memory plan is made from, if this decision may start Train. A plan may take long: it is made before."""
    status = observation.status
    retried = observation.annotations.get(RETRY_ANNOTATION, "") not in ("", status.observed_retry)
    if observation.invalid or observation.deleting or (conditions.terminal(status) and not retried):
        return None
    running = attempts.running(status)
    if conditions.next_stage(status, observation.spec) not in (Stage.PREPARE, Stage.TRAIN):
        return None
    if running is not None and running.stage is Stage.TRAIN:
        return None
    report = observation.report_of(Stage.PREPARE, status.attempts_started.get(Stage.PREPARE, 0))
    if report is None or not report.done or report.model is None or report.lengths is None:
        return None
    return report.model, report.lengths


def with_plan(observation: Observation, planner: Planner) -> Observation:
    """The observation with the plan that its decision needs."""
    inputs = plan_inputs(observation)
    return observation if inputs is None else replace(observation, plan=planner(observation.spec, *inputs))


def start_next_attempt(draft: StatusDraft, stage: Stage) -> JobCondition:
    """Record the stage's next attempt, unless it is known not to fit."""
    status = draft.status
    if stage is Stage.TRAIN:
        refused = _plan_memory(draft)
        if refused is not None:
            return refused
    record = attempts.add(status, stage, _footprint(draft, stage), draft.now)
    status.progress, status.progress_text, status.eta_text, status.activity = None, "", "", ""
    return starting(record)


def _plan_memory(draft: StatusDraft) -> JobCondition | None:
    """Make the memory plan from what Prepare found; a plan that does not fit ends the job before a GPU is taken."""
    status = draft.status
    plan = draft.observation.plan
    if isinstance(plan, PlanFailure):
        return draft.fail(condition_reason(FailureClass.BAD_SPEC), f"Training cannot be planned: {plan.sentence}.")
    status.plan = plan or status.plan
    if status.plan is None:
        return None
    status.warnings = progress.merged_warnings(status.warnings, status.plan.warnings)
    if status.plan.fits is not False:
        return None
    advice = " ".join(status.plan.warnings)
    message = f"Training does not fit into memory. {advice}".strip()
    return draft.fail(condition_reason(FailureClass.DOES_NOT_FIT), message)


def _footprint(draft: StatusDraft, stage: Stage) -> Footprint | None:
    """What the plan gives the stage, as far as earlier out-of-memory failures have left it."""
    last, plan = attempts.latest(draft.status, stage), draft.status.plan
    if last is not None and last.reason == FailureClass.CUDA_OOM:
        return smaller_footprint(draft, last)
    if last is not None and (last.micro_batch_tokens is not None or last.activation_checkpointing is not None):
        return Footprint(last.micro_batch_tokens, bool(last.activation_checkpointing))
    if plan is None or stage is not Stage.TRAIN:
        return None
    return Footprint(plan.micro_batch_tokens, plan.activation_checkpointing)


def smaller_footprint(draft: StatusDraft, last: AttemptRecord) -> Footprint | None:
    """The next smaller footprint than an attempt's; None if there is none."""
    status = draft.status
    prepared = draft.observation.report_of(Stage.PREPARE, status.attempts_started.get(Stage.PREPARE, 0))
    longest = prepared.lengths.longest if prepared is not None and prepared.lengths is not None else None
    tokens = last.micro_batch_tokens or (status.plan.micro_batch_tokens if status.plan is not None else None)
    always = bool(draft.spec.training.activation_checkpointing)
    footprint = Footprint(tokens, always or bool(last.activation_checkpointing))
    return shrink(footprint, longest, can_checkpoint=last.stage is Stage.TRAIN)
