"""Clocks of a job: running time and its price, start-up of a gang, the hang backstop, waiting for the user.

Every function is given the time; none reads a clock.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from finetune_api.base import Stage, duration_seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import JobStatus
from finetune_operator.decision import root_cause
from finetune_operator.decision.model import Child, Environment, Observation, PodPhase, RunningAttempt

REPORT_WAIT_SECONDS = 60
"""How long a report may arrive after the pods that wrote it succeeded."""
SETTLE_SECONDS = 10
"""How long other ranks may name an earlier cause after one of them named itself."""
GRACE_MARGIN_SECONDS = 30
"""How much longer than the grace period we wait for pods that end without an error report."""
HANG_STAGES = frozenset({Stage.PREPARE, Stage.TRAIN, Stage.EVALUATE})
"""Stages that report all the time: GPUs are freed, and data that is read for ever keeps no pod."""


def gpus_held(spec: FineTuneJobSpec, stage: Stage, environment: Environment) -> int:
    """GPUs that an attempt of a stage holds."""
    per_node = spec.topology.gpus_per_node
    if per_node is None:
        per_node = environment.gpus_per_node
    return {Stage.TRAIN: per_node * spec.topology.nodes, Stage.EVALUATE: per_node}.get(stage, 0)


def account_time(status: JobStatus, running: RunningAttempt, observation: Observation) -> None:
    """Bring running time, GPU-hours and price of the status up to now.

    Time counts while all pods run, up to the last pod's end once they have ended.
    """
    record, child, now, environment = running.record, running.child, observation.now, observation.environment
    runs = child is not None and child.all_run and not child.succeeded
    if runs and child is not None and record.running_since is None:
        record.running_since = now if status.active_until is not None else _since(child, now)
    if status.active_until is None:
        status.active_until = now if runs else None
        return
    end = now if runs else _end(child, status.active_until, now)
    seconds = max(int((end - status.active_until).total_seconds()), 0)
    gpus = gpus_held(observation.spec, record.stage, environment)
    status.active_seconds += seconds
    status.gpu_hours = round(status.gpu_hours + seconds * gpus / 3600, 9)
    if environment.price_per_gpu_hour is not None:
        status.price = round(status.gpu_hours * environment.price_per_gpu_hour, 2)
    status.active_until = now if runs else None


def _since(child: Child, now: datetime) -> datetime:
    started = [pod.started for pod in child.pods if pod.started is not None]
    return min(max(started), now) if len(started) == len(child.pods) and started else now


def _end(child: Child | None, since: datetime, now: datetime) -> datetime:
    finished = [pod.finished for pod in child.pods if pod.finished is not None] if child else []
    return min(max([since, *finished]), now) if finished else now


def startup_deadline(child: Child, spec: FineTuneJobSpec) -> datetime | None:
    """When a gang must be whole: `timeouts.startup` after its first pod ran. None while none runs, or all do."""
    if child.all_run:
        return None
    started = [pod.started for pod in child.pods if pod.phase is PodPhase.RUNNING and pod.started is not None]
    return min(started) + timedelta(seconds=duration_seconds(spec.timeouts.startup)) if started else None


def hang_deadline(running: RunningAttempt, observation: Observation) -> datetime | None:
    """When silence is too long: well after every rank's own watchdog must have reported."""
    record, report, timeouts = running.record, running.report, observation.spec.timeouts
    if record.running_since is None or record.stage not in HANG_STAGES:
        return None
    silent_since = max(report.time, record.running_since) if report else record.running_since
    limit = duration_seconds(timeouts.hang) * observation.environment.hang_backstop_factor
    return silent_since + timedelta(seconds=limit + duration_seconds(timeouts.startup))


def evidence_deadline(running: RunningAttempt, observation: Observation) -> datetime | None:
    """When an attempt whose pods have begun to end is concluded, although some still run or its report is missing.

    Soon after a cause was named, by a rank or by the loss of a node; otherwise when the grace period is over.
    """
    exited, child = running.record.exited, running.child
    if exited is None or child is None:
        return None
    if child.succeeded:
        return later(exited, REPORT_WAIT_SECONDS)
    latest = later(exited, observation.environment.grace_seconds + GRACE_MARGIN_SECONDS)
    cause_named = root_cause.named_at(child, running.report)
    if cause_named is None and any(pod.abandoned for pod in child.pods):
        cause_named = exited
    if cause_named is None:
        return latest
    # `cause_named` is by a rank's clock.
    return min(later(max(exited, min(cause_named, observation.now)), SETTLE_SECONDS), latest)


def active_deadline(status: JobStatus, spec: FineTuneJobSpec) -> datetime | None:
    """When the running time is used up if all pods go on running; None while they do not, or without a deadline."""
    limit = spec.timeouts.active_deadline_seconds
    if limit is None or status.active_until is None:
        return None
    return status.active_until + timedelta(seconds=max(limit - status.active_seconds, 0))


def used_up(status: JobStatus, spec: FineTuneJobSpec) -> bool:
    """Whether the job has run for `timeouts.activeDeadlineSeconds`."""
    limit = spec.timeouts.active_deadline_seconds
    return limit is not None and status.active_seconds >= limit


def used_up_message(spec: FineTuneJobSpec) -> str:
    """That it has, in a sentence."""
    seconds = spec.timeouts.active_deadline_seconds
    return f"The job has reached its running time limit of {seconds} s (timeouts.activeDeadlineSeconds)."


def user_deadline(status: JobStatus, spec: FineTuneJobSpec) -> datetime | None:
    """When waiting for the user ends. Nothing runs meanwhile, so what is left of the deadline is counted by the wall
    clock, from the beginning of the wait."""
    limit = spec.timeouts.active_deadline_seconds
    if limit is None or status.waiting_since is None:
        return None
    return status.waiting_since + timedelta(seconds=max(limit - status.active_seconds, 0))


def later(moment: datetime, seconds: float) -> datetime:
    """`seconds` after `moment`, to the next whole second: the status carries no fractions."""
    return moment + timedelta(seconds=math.ceil(seconds))
