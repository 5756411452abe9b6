"""Clocks of a job: running time and its price, start-up of a gang, the hang backstop, waits for the user.

Every function is given the time; none reads a clock.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from finetune_api.base import Stage, duration_seconds
from finetune_api.report import Report
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AttemptRecord, JobStatus
from finetune_operator.decision.model import Child, Environment, Pod, PodPhase

REPORT_WAIT_SECONDS = 60
"""How long a report may come after the pods that wrote it succeeded."""
SETTLE_SECONDS = 10
"""How long other ranks may name an earlier cause after one of them named itself."""
GRACE_MARGIN_SECONDS = 30
"""How much longer than the grace period we wait for pods that end without a word."""
HANG_STAGES = frozenset({Stage.TRAIN, Stage.EVALUATE})
"""Stages that hold GPUs: the operator's own check frees them."""


def gpus_held(spec: FineTuneJobSpec, stage: Stage, environment: Environment) -> int:
    """GPUs that an attempt of a stage holds."""
    per_node = spec.topology.gpus_per_node
    a_node = environment.gpus_per_node if per_node is None else per_node
    return {Stage.TRAIN: a_node * spec.topology.nodes, Stage.EVALUATE: a_node}.get(stage, 0)


def all_run(child: Child) -> bool:
    """Whether every pod runs (or has run to its end): running time counts from here."""
    up = [pod for pod in child.pods if pod.phase in (PodPhase.RUNNING, PodPhase.SUCCEEDED)]
    return len(up) >= child.pods_expected


def meter(
    status: JobStatus,
    record: AttemptRecord,
    child: Child | None,
    spec: FineTuneJobSpec,
    env: Environment,
    now: datetime,
) -> None:
    """Bring running time, GPU-hours and price up to `now` in place.

    Time counts while all pods run, up to the last pod's end once they have ended.
    """
    running = child is not None and all_run(child) and not child.succeeded
    if status.active_until is not None:
        end = now if running else _end(child, status.active_until, now)
        seconds = max(int((end - status.active_until).total_seconds()), 0)
        status.active_seconds += seconds
        status.gpu_hours = round(status.gpu_hours + seconds * gpus_held(spec, record.stage, env) / 3600, 9)
        if env.price_per_gpu_hour is not None:
            status.price = round(status.gpu_hours * env.price_per_gpu_hour, 2)
        status.active_until = end if running else None
    elif running and child is not None:
        record.running_since = record.running_since or _since(child, now)
        status.active_until = now
    if running and record.running_since is None:
        record.running_since = now


def _since(child: Child, now: datetime) -> datetime:
    started = [pod.started for pod in child.pods if pod.started is not None]
    return min(max(started), now) if len(started) == len(child.pods) and started else now


def _end(child: Child | None, since: datetime, now: datetime) -> datetime:
    finished = [pod.finished for pod in child.pods if pod.finished is not None] if child else []
    return min(max([since, *finished]), now) if finished else now


def startup_deadline(child: Child, spec: FineTuneJobSpec) -> datetime | None:
    """When a gang must be whole: `timeouts.startup` after its first pod ran. None while none runs, or all do."""
    if all_run(child):
        return None
    started = [pod.started for pod in child.pods if pod.phase is PodPhase.RUNNING and pod.started is not None]
    return min(started) + timedelta(seconds=duration_seconds(spec.timeouts.startup)) if started else None


def hang_deadline(
    record: AttemptRecord, report: Report | None, spec: FineTuneJobSpec, environment: Environment
) -> datetime | None:
    """When silence is too long: well after every rank's own watchdog must have spoken."""
    if record.running_since is None or record.stage not in HANG_STAGES:
        return None
    silent_since = max(report.time, record.running_since) if report else record.running_since
    limit = duration_seconds(spec.timeouts.hang) * environment.hang_backstop_factor
    return silent_since + timedelta(seconds=limit + duration_seconds(spec.timeouts.startup))


def evidence_deadline(
    record: AttemptRecord, child: Child, cause_named: datetime | None, environment: Environment, now: datetime
) -> datetime | None:
    """When an attempt whose pods have begun to end is concluded, although some still run or its report is not there.

    Soon after a cause was named (`cause_named`, by a rank's clock, or a node's loss); without one when the grace
    period is over.
    """
    if record.exited is None:
        return None
    if child.succeeded:
        return later(record.exited, REPORT_WAIT_SECONDS)
    longest = later(record.exited, environment.grace_seconds + GRACE_MARGIN_SECONDS)
    if cause_named is None:
        return longest
    return min(later(max(record.exited, min(cause_named, now)), SETTLE_SECONDS), longest)


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


def user_deadline(status: JobStatus, spec: FineTuneJobSpec) -> datetime | None:
    """When waiting for the user ends: nothing runs meanwhile, so that what is left of the deadline is counted by the
    wall clock, from the beginning of the wait."""
    limit = spec.timeouts.active_deadline_seconds
    if limit is None or status.waiting_since is None:
        return None
    return status.waiting_since + timedelta(seconds=max(limit - status.active_seconds, 0))


def ended(pod: Pod) -> bool:
    """Whether a pod can do nothing any more."""
    return pod.phase in (PodPhase.SUCCEEDED, PodPhase.FAILED) or pod.out_of_service


def given_up(pod: Pod) -> bool:
    """Whether the cluster has given a pod up with its node: it will never say how it ended, but it may still write."""
    return pod.node_lost and pod.terminating


def later(moment: datetime, seconds: float) -> datetime:
    """`seconds` after `moment`, to the next whole second: the status carries no fractions."""
    return moment + timedelta(seconds=math.ceil(seconds))
