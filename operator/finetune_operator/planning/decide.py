"""Observation → Decision: the one place where it is decided what happens to a job next. Pure.

A decision first brings the status up to date. Only if that changes no conclusion, that is, if the persisted
status already says what we would say, does it act: what is destroyed has been recorded, and what is started
is known by its record, so that a crash at any moment is gone on from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from finetune_api.base import Stage
from finetune_api.report import FailureClass, LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AttemptRecord, ConditionType, JobStatus, Phase
from finetune_operator.planning import attempts, conditions, deadlines, events, progress
from finetune_operator.planning.attempts import Ending
from finetune_operator.planning.conditions import State, Verdict
from finetune_operator.planning.failure_policy import (
    Disturbance,
    Footprint,
    Then,
    backoff_seconds,
    camel,
    policy_for,
    shrink,
    waits_for_user,
)
from finetune_operator.planning.model import (
    Action,
    Child,
    CleanUp,
    Decision,
    DeleteChild,
    EnsureShared,
    Observation,
    StartAttempt,
)
from finetune_operator.planning.root_cause import Cause

RETRY_ANNOTATION = "finetune.dev/retry"
TRANSIENT_POLL_SECONDS = 15.0
"""How often a start is tried again that quota or a webhook refused."""

Planner = Callable[[FineTuneJobSpec, ModelFacts, LengthFacts], Plan]

_RUNNING: dict[Stage, tuple[str, Phase]] = {
    Stage.PREPARE: ("Preparing", Phase.PREPARING),
    Stage.TRAIN: ("Training", Phase.TRAINING),
    Stage.EVALUATE: ("Evaluating", Phase.EVALUATING),
    Stage.PUBLISH: ("Publishing", Phase.PUBLISHING),
}
_WAITING_FOR = {
    "Secret": "WaitingForSecret",
    "PersistentVolumeClaim": "WaitingForClaim",
    "Webhook": "WaitingForWebhook",
    "Quota": "WaitingForQuota",
}


@dataclass
class Draft:
    """The status being made, and when to look again."""

    seen: Observation
    status: JobStatus
    planner: Planner | None
    wakes: list[datetime] = field(default_factory=list)

    @property
    def now(self) -> datetime:
        return self.seen.now

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.seen.spec

    def wake_at(self, moment: datetime | None) -> None:
        if moment is not None:
            self.wakes.append(moment)


def decide(seen: Observation, planner: Planner | None = None) -> Decision:
    """What to record of a job and what to do about it. The same observation gives the same decision."""
    seen = replace(seen, now=seen.now.replace(microsecond=0))
    if seen.deleting:
        return Decision(seen.status)
    draft = Draft(seen, seen.status.model_copy(deep=True), planner)
    _touch(draft)
    verdict = _judge(draft)
    conditions.write(draft.status, verdict, seen.spec, seen.now)
    if progress.material(draft.status) != progress.material(seen.status):
        return Decision(draft.status, events=events.between(seen.status, draft.status), requeue_after=0.0)
    return Decision(draft.status, _actions(draft), requeue_after=_requeue(draft))


def _touch(draft: Draft) -> None:
    status, seen = draft.status, draft.seen
    if status.start_time is None:
        status.start_time = seen.now
        status.observed_retry = seen.annotations.get(RETRY_ANNOTATION, "")
    status.observed_generation = seen.generation


def _judge(draft: Draft) -> Verdict:
    """Walk from what is settled to what is open: retry, ends, the running attempt, suspension, the next attempt."""
    if draft.seen.invalid:
        return _invalid(draft)
    _observe_retry(draft)
    if conditions.terminal(draft.status):
        return _ended(draft)
    record = attempts.live(draft.status)
    if record is not None:
        verdict = _follow(draft, record)
        if verdict is not None:
            return verdict
    else:
        _listen_after_the_end(draft)
    return _go_on(draft)


def _go_on(draft: Draft) -> Verdict:
    """No attempt runs: the job is complete, or suspended, or waits, or enters its next attempt."""
    status, spec = draft.status, draft.spec
    stage = conditions.next_stage(status, spec)
    if stage is None:
        return _complete(draft)
    if deadlines.used_up(status, spec):
        return _fail(draft, "DeadlineExceeded", _deadline_sentence(spec))
    blocked = attempts.blocking(draft.seen, status)
    if spec.suspend:
        status.retry_at = None
        if blocked:
            return Verdict(State.PROGRESSING, "Suspending", blocked, Phase.SUSPENDING)
        return Verdict(State.SUSPENDED, "Suspended", "Suspended: set spec.suspend to false to go on.", Phase.SUSPENDED)
    if blocked:
        return Verdict(State.PROGRESSING, "WaitingForPreviousAttempt", blocked, Phase.WAITING)
    return _waits(draft, stage) or _enter(draft, stage)


def _waits(draft: Draft, stage: Stage) -> Verdict | None:
    """What keeps the next attempt from being entered, if anything."""
    for wait in (_wait_for_user, _wait_for_missing, _wait_for_backoff):
        verdict = wait(draft, stage)
        if verdict is not None:
            return verdict
    draft.status.waiting_since = None
    return None


def _wait_for_user(draft: Draft, stage: Stage) -> Verdict | None:
    status, seen = draft.status, draft.seen
    if not status.credentials_seen:
        return None
    record = attempts.latest(status, stage)
    if record is None or status.credentials_seen != _credentials(seen):
        status.credentials_seen = ""
        return None
    status.waiting_since = status.waiting_since or seen.now
    until = deadlines.user_deadline(status, seen.spec)
    if until is not None and seen.now >= until:
        return _fail(draft, "DeadlineExceeded", f"Nobody helped in time: {record.message}")
    draft.wake_at(until)
    way = "Goes on when the Secret changes or the annotation finetune.dev/retry gets a new value."
    reason = "WaitingForCredentials" if record.reason == FailureClass.NO_ACCESS else "WaitingForUser"
    return Verdict(State.PROGRESSING, reason, f"{record.message} {way}", Phase.WAITING)


def _credentials(seen: Observation) -> str:
    """State of the Secrets as it is remembered; never empty, for empty means that nobody waits."""
    return f"={seen.credentials_version}"


def _wait_for_missing(draft: Draft, stage: Stage) -> Verdict | None:
    status, seen = draft.status, draft.seen
    lacking = next((m for m in seen.missing if m.kind in ("Secret", "PersistentVolumeClaim")), None)
    if lacking is None:
        return None
    status.waiting_since = status.waiting_since or seen.now
    until = deadlines.user_deadline(status, seen.spec)
    if until is not None and seen.now >= until:
        return _fail(draft, "DeadlineExceeded", f"Nobody helped in time: {lacking.sentence}")
    draft.wake_at(until)
    return Verdict(State.PROGRESSING, _WAITING_FOR[lacking.kind], lacking.sentence, Phase.WAITING)


def _wait_for_backoff(draft: Draft, stage: Stage) -> Verdict | None:
    at = draft.status.retry_at
    if at is None or draft.now >= at:
        return None
    draft.wake_at(at)
    record = attempts.latest(draft.status, stage)
    why = f" after: {record.message}" if record is not None else "."
    return Verdict(State.PROGRESSING, "BackingOff", f"The next attempt at {stage} follows{why}", Phase.BACKING_OFF)


def _enter(draft: Draft, stage: Stage) -> Verdict:
    """Record the stage's next attempt, unless it is known not to fit."""
    status = draft.status
    if stage is Stage.TRAIN:
        refused = _plan(draft)
        if refused is not None:
            return refused
    footprint = _footprint(draft, stage)
    attempts.open_next(status, stage, footprint, draft.now)
    status.progress, status.progress_text, status.activity = None, "", ""
    return _starting(stage)


def _starting(stage: Stage) -> Verdict:
    _, phase = _RUNNING[stage]
    return Verdict(State.PROGRESSING, "Starting", f"Starts {stage}.", phase)


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
    return _fail(draft, camel(FailureClass.DOES_NOT_FIT), f"The training does not fit. {advice}".strip())


def _footprint(draft: Draft, stage: Stage) -> Footprint | None:
    """What earlier out-of-memories of this stage have left."""
    last = attempts.latest(draft.status, stage)
    if last is None or (last.micro_batch_tokens is None and last.activation_checkpointing is None):
        plan = draft.status.plan
        first = Footprint(plan.micro_batch_tokens, False) if plan is not None and stage is Stage.TRAIN else None
        if last is None or last.reason != FailureClass.CUDA_OOM:
            return first
        return _shrunk(draft, last)
    if last.reason == FailureClass.CUDA_OOM:
        return _shrunk(draft, last)
    return Footprint(last.micro_batch_tokens, bool(last.activation_checkpointing))


def _shrunk(draft: Draft, last: AttemptRecord) -> Footprint | None:
    status, seen = draft.status, draft.seen
    prepared = attempts.report_of(seen, Stage.PREPARE, status.attempts_started.get(Stage.PREPARE, 0))
    longest = prepared.lengths.longest if prepared is not None and prepared.lengths is not None else None
    tokens = last.micro_batch_tokens or (status.plan.micro_batch_tokens if status.plan is not None else None)
    always = bool(seen.spec.training.activation_checkpointing)
    now = Footprint(tokens, always or bool(last.activation_checkpointing))
    return shrink(now, longest, can_checkpoint=last.stage is Stage.TRAIN)


def _follow(draft: Draft, record: AttemptRecord) -> Verdict | None:
    """Follow the running attempt; None once its end is recorded and the job goes on."""
    seen, status = draft.seen, draft.status
    child = attempts.child_of(seen, record)
    report = attempts.report_of(seen, record.stage, record.number)
    deadlines.meter(status, record, child, seen.spec, seen.environment, seen.now)
    if report is not None:
        progress.absorb(status, record, report)
    ending = attempts.conclude(record, child, report, seen)
    if ending is None:
        ending = _stopped(draft)
    if ending is None:
        return _underway(draft, record, child)
    if ending.cause is None:
        return _succeed(draft, record)
    return _failed(draft, record, ending.cause)


def _stopped(draft: Draft) -> Ending | None:
    """Ends that we make: the deadline, suspension."""
    if deadlines.used_up(draft.status, draft.spec):
        return Ending(Cause(Disturbance.DEADLINE, _deadline_sentence(draft.spec)))
    if draft.spec.suspend:
        return Ending(Cause(Disturbance.SUSPENDED, "spec.suspend is true."))
    return None


def _deadline_sentence(spec: FineTuneJobSpec) -> str:
    return f"The job has run for {spec.timeouts.active_deadline_seconds} s (timeouts.activeDeadlineSeconds)."


def _succeed(draft: Draft, record: AttemptRecord) -> Verdict | None:
    status = draft.status
    report = attempts.report_of(draft.seen, record.stage, record.number)
    assert report is not None
    attempts.close(record, Ending(), counted=False, now=draft.now)
    status.active_until = None
    progress.conclude(status, report)
    conditions.finish(status, record.stage, _success_sentence(status, record.stage), draft.now)
    gate = status.results.gate if record.stage is Stage.EVALUATE and status.results is not None else None
    if gate is not None and not gate.passed:
        where = f" The model is in {status.export.path} on the run volume." if status.export else ""
        return _fail(draft, "GateRefused", f"{gate.sentence}{where}")
    return None


def _success_sentence(status: JobStatus, stage: Stage) -> str:
    if stage is Stage.PREPARE:
        rows = sum(dataset.train for dataset in status.datasets)
        return f"{rows} rows to train on, of {len(status.datasets)} datasets."
    if stage is Stage.TRAIN and status.export is not None:
        return f"Model of step {status.export.step} in {status.export.path}, {status.export.digest[:19]}."
    if stage is Stage.EVALUATE and status.results is not None:
        return f"{status.metric_text}: {status.results.gate.sentence}".strip(": ")
    if status.published is not None:
        return f"Published to {status.published.url or status.published.repo or status.published.path}."
    return "Succeeded."


def _failed(draft: Draft, record: AttemptRecord, cause: Cause) -> Verdict | None:
    """Record a failure and what follows from it by the policy."""
    status, seen = draft.status, draft.seen
    policy = policy_for(cause.reason)
    attempts.close(record, Ending(cause), policy.counted, draft.now)
    status.active_until = None
    if policy.counted:
        used = status.failures_counted.get(record.stage, 0) + 1
        status.failures_counted = status.failures_counted | {str(record.stage): used}
    if waits_for_user(cause.reason, record.stage, seen.environment.local):
        status.credentials_seen = _credentials(seen)
        return None
    if policy.then is Then.FAIL:
        reason = "DeadlineExceeded" if cause.reason is Disturbance.DEADLINE else camel(cause.reason)
        return _fail(draft, reason, _with_model(status, f"{record.stage} failed: {cause.sentence}"))
    limit = seen.spec.retry.limit
    if policy.counted and status.failures_counted[record.stage] > limit:
        sentence = f"{record.stage} failed: {cause.sentence} (retry.limit {limit} is used up)"
        return _fail(draft, camel(cause.reason), _with_model(status, sentence))
    if policy.then is Then.SHRINK and _shrunk(draft, record) is None:
        sentence = f"{cause.sentence} The longest document alone does not fit: shorten training.maxSequenceLength, "
        sentence += "shard over more GPUs, or use qlora."
        return _fail(draft, camel(FailureClass.DOES_NOT_FIT), sentence)
    _back_off(draft, record, cause)
    return None


def _with_model(status: JobStatus, sentence: str) -> str:
    return sentence if status.export is None else f"{sentence} The model is in {status.export.path} on the run volume."


def _back_off(draft: Draft, record: AttemptRecord, cause: Cause) -> None:
    if cause.reason is Disturbance.SUSPENDED:
        return
    environment = draft.seen.environment
    seconds = backoff_seconds(
        f"{draft.seen.uid}/{record.stage}/{record.number}",
        attempts.failures_in_a_row(draft.status, record),
        environment.backoff_base_seconds,
        environment.backoff_cap_seconds,
    )
    draft.status.retry_at = deadlines.later(draft.now, seconds)


def _underway(draft: Draft, record: AttemptRecord, child: Child | None) -> Verdict:
    """The attempt goes on, or is on its way: say what it does or waits for, and when to look again."""
    seen, status = draft.seen, draft.status
    report = attempts.report_of(seen, record.stage, record.number)
    if child is None:
        return _not_made_yet(draft, record)
    draft.wake_at(attempts.evidence_due(record, child, report, seen))
    draft.wake_at(deadlines.active_deadline(status, seen.spec))
    reason, phase = _RUNNING[record.stage]
    if child.queued:
        queue = seen.spec.pod_template.queue_name
        return Verdict(State.PROGRESSING, "Queued", f"Waits for its turn in queue {queue or '(Kueue)'}.", Phase.QUEUED)
    draft.wake_at(deadlines.startup_deadline(child, seen.spec))
    waiting = min((pod.waiting for pod in child.pods if pod.waiting), default="")
    if waiting and not deadlines.all_run(child):
        return Verdict(State.PROGRESSING, "WaitingForPods", waiting, Phase.WAITING)
    if record.exited is not None:
        return Verdict(State.PROGRESSING, "Ending", "Pods have ended: reads what they left.", phase)
    if not deadlines.all_run(child):
        return _starting(record.stage)
    return _running(draft, record, reason, phase)


def _running(draft: Draft, record: AttemptRecord, reason: str, phase: Phase) -> Verdict:
    seen = draft.seen
    report = attempts.report_of(seen, record.stage, record.number)
    hang = deadlines.hang_deadline(record, report, seen.spec, seen.environment)
    if hang is not None and report is None and seen.now >= hang:
        sentence = "The report channel is broken: all pods run, but no report of this attempt ever arrived."
        return Verdict(State.PROGRESSING, "ReportChannelBroken", sentence, phase)
    draft.wake_at(hang)
    return Verdict(State.PROGRESSING, reason, f"{record.stage}, attempt {record.number}.", phase)


def _not_made_yet(draft: Draft, record: AttemptRecord) -> Verdict:
    lacking = next(iter(draft.seen.missing), None)
    if lacking is None:
        return _starting(record.stage)
    draft.wake_at(deadlines.later(draft.now, TRANSIENT_POLL_SECONDS))
    return Verdict(State.PROGRESSING, _WAITING_FOR[lacking.kind], lacking.sentence, Phase.WAITING)


def _listen_after_the_end(draft: Draft) -> None:
    """An attempt that was told to stop goes on reporting until it is gone: its last checkpoint counts."""
    stage = conditions.next_stage(draft.status, draft.spec)
    record = attempts.latest(draft.status, stage) if stage is not None else None
    report = attempts.report_of(draft.seen, record.stage, record.number) if record is not None else None
    if report is not None:
        draft.status.last_checkpoint = report.last_checkpoint or draft.status.last_checkpoint


def _observe_retry(draft: Draft) -> None:
    """A new value of the retry annotation gives the failed stage a fresh budget and keeps the finished ones."""
    status, seen = draft.status, draft.seen
    asked = seen.annotations.get(RETRY_ANNOTATION, "")
    if asked == status.observed_retry or not asked:
        return
    status.observed_retry = asked
    if status.is_true(ConditionType.COMPLETE):
        return
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True":
        if failed.reason == "GateRefused":
            conditions.reopen(status, Stage.EVALUATE, seen.now)
        conditions.put(status, ConditionType.FAILED, False, "Retried", "Retried by annotation.", seen.now)
        status.completion_time = None
    stage = conditions.next_stage(status, seen.spec)
    status.failures_counted = {name: n for name, n in status.failures_counted.items() if name != stage}
    status.retry_at, status.waiting_since, status.credentials_seen = None, None, ""


def _complete(draft: Draft) -> Verdict:
    status = draft.status
    status.completion_time = status.completion_time or draft.now
    status.retry_at, status.waiting_since, status.credentials_seen = None, None, ""
    parts = [status.metric_text, status.published.url if status.published is not None else ""]
    told = "; ".join(part for part in parts if part)
    return Verdict(State.COMPLETE, "Complete", f"Complete: {told}." if told else "Complete.", Phase.COMPLETE)


def _fail(draft: Draft, reason: str, sentence: str) -> Verdict:
    status = draft.status
    status.completion_time = status.completion_time or draft.now
    status.retry_at, status.waiting_since, status.credentials_seen = None, None, ""
    return Verdict(State.FAILED, reason, sentence, Phase.FAILED)


def _ended(draft: Draft) -> Verdict:
    """What was concluded once stays, whatever the world looks like now."""
    status = draft.status
    for kind, state, phase in (
        (ConditionType.COMPLETE, State.COMPLETE, Phase.COMPLETE),
        (ConditionType.FAILED, State.FAILED, Phase.FAILED),
    ):
        condition = status.condition(kind)
        if condition is not None and condition.status == "True":
            draft.wake_at(_clean_up_at(draft))
            return Verdict(state, condition.reason, condition.message, phase)
    raise AssertionError("only called for a job that has ended")


def _invalid(draft: Draft) -> Verdict:
    """A spec that cannot be read: a new job fails; one that has begun is left alone and says so."""
    status, sentence = draft.status, draft.seen.invalid
    if conditions.terminal(status):
        return _ended(draft)
    if status.attempts_started:
        sentence = f"This version of the operator cannot read the spec and leaves the job alone: {sentence}"
        return Verdict(State.PROGRESSING, "SpecUnreadable", sentence, status.phase)
    return _fail(draft, camel(FailureClass.BAD_SPEC), sentence)


def _actions(draft: Draft) -> tuple[Action, ...]:
    """What follows from a status that is persisted."""
    status, seen = draft.status, draft.seen
    if seen.invalid:
        return ()
    due = _clean_up_at(draft)
    if due is not None and seen.now >= due and seen.children:
        return (CleanUp(),)
    doomed = tuple(_doomed(draft))
    record = attempts.live(status)
    if record is None or attempts.child_of(seen, record) is not None:
        return doomed
    if any(not child.ours for child in seen.children):
        return doomed
    return (*doomed, EnsureShared(), StartAttempt(attempts.to_start(seen, record)))


def _doomed(draft: Draft) -> list[DeleteChild]:
    """Children whose attempt has ended without success. A job that failed keeps pods that ended, for their logs."""
    status, found = draft.status, []
    for child in draft.seen.children:
        record = attempts.find(status, child.stage, child.number)
        going = record is not None and record.outcome in ("running", "succeeded")
        if going or not child.ours or not child.exists or child.deleting:
            continue
        if conditions.terminal(status) and all(deadlines.ended(pod) for pod in child.pods):
            continue
        why = record.message if record is not None else "no attempt of that number is in the status"
        found.append(DeleteChild(child.stage, child.number, why))
    return found


def _clean_up_at(draft: Draft) -> datetime | None:
    ttl = draft.spec.cleanup.ttl_seconds_after_finished
    ended = draft.status.completion_time
    if ttl is None or ended is None or not conditions.terminal(draft.status) or not draft.seen.children:
        return None
    return deadlines.later(ended, ttl)


def _requeue(draft: Draft) -> float | None:
    """Seconds to the nearest moment at which the decision may change by itself."""
    ahead = [(moment - draft.now).total_seconds() for moment in draft.wakes]
    return max(min(ahead), 1.0) if ahead else None
