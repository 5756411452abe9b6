"""Turns the API server's objects into an Observation. Pure: it receives objects and reads none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from finetune_api.base import Stage
from finetune_api.report import MAX_REPORT_BYTES, Failure, Report
from finetune_api.spec import Dataset, FineTuneJobSpec, Model, Tuning
from finetune_api.status import AttemptRecord, JobStatus
from finetune_api.structure import first_problem
from finetune_api.traits import Method
from finetune_operator.cluster.api import Object
from finetune_operator.decision.model import Child, Environment, Missing, Observation, Pod, PodPhase
from finetune_operator.manifests.backend import Backend, ObjectState, condition_of, describe
from finetune_operator.manifests.backends import BACKENDS
from finetune_operator.manifests.job import UID_LABEL
from finetune_operator.manifests.labels import ATTEMPT, STAGE, node_rank
from finetune_operator.programs import PROGRAMS

NODE_LOST_REASONS = frozenset({"DeletionByTaintManager"})
STUCK_REASONS = frozenset(
    {
        "ErrImagePull",
        "ErrImageNeverPull",
        "ImagePullBackOff",
        "SignatureValidationFailed",
        "RegistryUnavailable",
        "CrashLoopBackOff",
        "InvalidImageName",
        "ImageInspectError",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    }
)
UNSCHEDULED_REASONS = frozenset({"Unschedulable", "SchedulingGated"})
UNSTARTED_REASONS = frozenset({"StartError", "ContainerCannotRun", "ContainerStatusUnknown"})
"""Reasons of ended containers whose message is the runtime's or the kubelet's own."""
CONTAINERS = frozenset({program.name for programs in PROGRAMS.values() for program in programs}) | {
    backend.container for backend in BACKENDS.values()
}
"""The trainer's containers. What a service mesh or a policy adds says nothing about an attempt."""
OWN_LIMIT = re.compile(r"exceed(s|ed) (the|its)", re.IGNORECASE)
"""In the kubelet's message: a pod was evicted for a limit of its own, not because its node ran out of something."""
CLOCK_TOLERANCE = timedelta(days=1)
"""How far the clock of a pod may be ahead of ours."""
UNREADABLE = FineTuneJobSpec(
    model=Model(path="unreadable"),
    datasets=[Dataset(name="unreadable", path="unreadable")],
    tuning=Tuning(method=Method.LORA),
)
"""Placeholder for a spec that cannot be read; the observation says why."""


@dataclass(frozen=True)
class JobObjects:
    """The objects of one job, as the store holds them."""

    job: Object
    spec: FineTuneJobSpec
    invalid: str = ""
    """Why the spec cannot be read; empty when it can."""
    carriers: tuple[Object, ...] = ()
    """Jobs and PyTorchJobs that carry its label."""
    pods: tuple[Object, ...] = ()
    channels: Mapping[Stage, Object | None] = field(default_factory=dict)
    """The ConfigMaps that the stages report into."""
    config: Object | None = None
    out_of_service: frozenset[str] = frozenset()
    """Nodes that carry the out-of-service taint."""
    missing: tuple[Missing, ...] = ()
    credentials_version: str = ""
    environment: Environment = field(default_factory=Environment)


def observe(objects: JobObjects, backend: Backend, now: datetime) -> Observation:
    """The observation that a decision is made from."""
    meta = objects.job["metadata"]
    uid = meta["uid"]
    status, unreadable = read_status(objects.job)
    usable, unusable = reports(objects.channels, uid, now)
    return Observation(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=uid,
        generation=meta.get("generation", 1),
        spec=objects.spec,
        status=status,
        now=now,
        annotations=dict(meta.get("annotations") or {}),
        deleting="deletionTimestamp" in meta,
        invalid=objects.invalid,
        unreadable=unreadable,
        children=children(uid, objects.carriers, objects.pods, objects.out_of_service, backend),
        reports=usable,
        unusable_reports=unusable,
        missing=objects.missing,
        credentials_version=objects.credentials_version,
        environment=objects.environment,
    )


def read_spec(job: Object) -> tuple[FineTuneJobSpec, str]:
    """The spec, and why it cannot be read (then the spec means nothing)."""
    try:
        return FineTuneJobSpec.model_validate(job.get("spec") or {}), ""
    except ValidationError as error:
        return UNREADABLE, f"{first_problem(error, 'spec')}."


def read_status(job: Object) -> tuple[JobStatus, str]:
    """The status, and why it cannot be read (then the status means nothing)."""
    try:
        return JobStatus.parse(job.get("status")), ""
    except ValidationError as error:
        return JobStatus(), f"{first_problem(error, 'status')}."


def reports(
    channels: Mapping[Stage, Object | None], uid: str, now: datetime
) -> tuple[tuple[Report, ...], dict[Stage, str]]:
    """What the stages of this job report, each in its own ConfigMap; and why what else is there cannot be used."""
    usable: list[Report] = []
    unusable: dict[Stage, str] = {}
    for stage, channel in channels.items():
        text = (channel.get("data") or {}).get(stage, "") if channel is not None and owner_uid(channel) == uid else ""
        if text:
            report = _read_report(text, stage, uid, now)
            if isinstance(report, Report):
                usable.append(report)
            else:
                unusable[stage] = report
    return tuple(usable), unusable


def _read_report(text: str, stage: Stage, uid: str, now: datetime) -> Report | str:
    """The report in a stage's ConfigMap, or why it cannot be used: the pods can write anything there."""
    if len(text) > MAX_REPORT_BYTES:
        return f"it is longer than {MAX_REPORT_BYTES:,} characters."
    try:
        report = Report.model_validate_json(text)
    except ValidationError as error:
        return f"{first_problem(error, 'report')}."
    if (report.stage, report.attempt.rpartition("/")[0]) != (stage, f"{uid}/{stage}"):
        return f"report.attempt: {report.attempt[:200]!r} is no attempt of this stage."
    if report.time > now + CLOCK_TOLERANCE:
        return f"report.time: {report.time:%Y-%m-%dT%H:%M:%SZ} is more than a day ahead."
    return report


def children(
    uid: str, carriers: Iterable[Object], pods: Iterable[Object], out_of_service: frozenset[str], backend: Backend
) -> tuple[Child, ...]:
    """Every attempt of which something exists: its object, its pods, or both."""
    objects = {key: carrier for carrier in carriers if (key := _key(carrier)) is not None}
    bodies: dict[tuple[str, Stage, int], list[Object]] = {}
    for pod in pods:
        key = _key(pod)
        if key is not None:
            bodies.setdefault(key, []).append(pod)
    return tuple(
        _child(key, objects.get(key), bodies.get(key, []), key[0] == uid, out_of_service, backend)
        for key in sorted(objects.keys() | bodies.keys())
    )


def _key(body: Object) -> tuple[str, Stage, int] | None:
    """Job uid, stage and number that a child or a pod belongs to; None for what carries no such labels."""
    labels = body["metadata"].get("labels") or {}
    try:
        return labels[UID_LABEL], Stage(labels[STAGE]), int(labels[ATTEMPT])
    except (KeyError, ValueError):
        return None


def is_of(body: Object, job: Object, record: AttemptRecord) -> bool:
    """Whether a child or a pod belongs to an attempt of a job."""
    return _key(body) == (job["metadata"]["uid"], record.stage, record.number)


def _child(
    key: tuple[str, Stage, int],
    body: Object | None,
    pods: list[Object],
    ours: bool,
    out_of_service: frozenset[str],
    backend: Backend,
) -> Child:
    _, stage, number = key
    read = tuple(sorted((read_pod(pod, out_of_service) for pod in pods), key=lambda pod: pod.node_rank))
    foreign = _foreign(stage, pods, backend) if body is None else ""
    if foreign:
        return _carried_by_another(stage, number, ours, read, foreign)
    if body is None:
        return Child(stage, number, ours=ours, exists=False, pods=read, pods_expected=max(len(read), 1))
    state = backend.state(body) if stage is Stage.TRAIN else batch_state(body)
    return Child(
        stage,
        number,
        ours=ours and owner_uid(body) == key[0],
        # Its controller waits for containers of others as well, which may never end.
        succeeded=state.succeeded or (len(read) >= state.pods_expected and _all_succeeded(read)),
        failed=state.failed,
        deleting="deletionTimestamp" in body["metadata"],
        queued=state.queued,
        message=state.message,
        created=_time(body["metadata"].get("creationTimestamp")),
        pods=read,
        pods_expected=state.pods_expected,
    )


def _foreign(stage: Stage, pods: list[Object], backend: Backend) -> str:
    """Kind of the other backend's object that pods of Train belong to; empty if they are of this backend."""
    owners = {owner.get("kind") for pod in pods for owner in pod["metadata"].get("ownerReferences") or []}
    if stage is not Stage.TRAIN or backend.owns_pods in owners:
        return ""
    return next((other.kind for other in BACKENDS.values() if other.owns_pods in owners), "")


def _carried_by_another(stage: Stage, number: int, ours: bool, pods: tuple[Pod, ...], kind: str) -> Child:
    """An attempt whose object is not watched: derived from its pods, all of which have to succeed."""
    return Child(
        stage,
        number,
        ours=ours,
        foreign=kind,
        succeeded=_all_succeeded(pods),
        failed=any(pod.phase is PodPhase.FAILED for pod in pods),
        pods=pods,
        pods_expected=len(pods),
    )


def _all_succeeded(pods: tuple[Pod, ...]) -> bool:
    return bool(pods) and all(pod.phase is PodPhase.SUCCEEDED for pod in pods)


def batch_state(body: Object) -> ObjectState:
    """The state of a batch/v1 Job; suspended (by a queue) means queued."""
    failed = condition_of(body, "Failed") or condition_of(body, "FailureTarget")
    return ObjectState(
        succeeded=condition_of(body, "Complete") is not None,
        failed=failed is not None,
        queued=bool(body["spec"].get("suspend")),
        message=describe(failed),
    )


def owner_uid(body: Object) -> str:
    """The uid of the controller of an object; empty if it has none."""
    owners = body["metadata"].get("ownerReferences") or []
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def read_pod(body: Object, out_of_service: frozenset[str]) -> Pod:
    """One pod: its phase, why it waits, how it ended, and what became of its node."""
    meta, spec, status = body["metadata"], body["spec"], body.get("status") or {}
    lost = status.get("phase") == "Unknown" or status.get("reason") == "NodeLost"
    disruption = condition_of(body, "DisruptionTarget")
    reason = (disruption or {}).get("reason", "")
    evicted, said = status.get("reason") == "Evicted", str(status.get("message") or "")
    before, main = _states(status, "initContainerStatuses"), _states(status, "containerStatuses")
    ended = [(name, state["terminated"]) for name, state in (before | main).items() if state.get("terminated")]
    failed_container, failed = next(((name, end) for name, end in ended if end.get("exitCode")), ("", None))
    last = failed or next((state.get("terminated") for state in main.values()), None) or {}
    pending = status.get("phase", "Pending") == "Pending"
    waiting = _waiting(meta["name"], body) if pending else ""
    # During the programs before the stage's own, which run in init containers, Kubernetes calls the pod Pending.
    began = min(filter(None, (_started(state) for state in before.values())), default=None)
    phase = _phase(status, last, running=lost or bool(pending and began and not waiting))
    node = spec.get("nodeName", "")
    return Pod(
        name=meta["name"],
        node_rank=node_rank(meta.get("labels") or {}),
        phase=phase,
        terminating="deletionTimestamp" in meta,
        evicted=evicted or (disruption is not None and reason not in NODE_LOST_REASONS),
        over_own_limit=evicted and OWN_LIMIT.search(said) is not None,
        refused=phase is PodPhase.FAILED and bool(status.get("reason")) and not (evicted or lost or last),
        node_lost=lost or reason in NODE_LOST_REASONS,
        out_of_service=node in out_of_service,
        oom_killed=any(end.get("reason") == "OOMKilled" for _, end in ended),
        memory_limit=_memory_limit(spec, failed_container),
        exit_code=last.get("exitCode"),
        failure=next((failure for _, end in ended if (failure := _failure(end)) is not None), None),
        message=said or (str(last.get("message") or "") if last.get("reason") in UNSTARTED_REASONS else ""),
        waiting=waiting,
        lingering=_lingering(status) if phase in (PodPhase.SUCCEEDED, PodPhase.FAILED) else "",
        started=began or next((_started(state) for state in main.values()), None),
        finished=_time(last.get("finishedAt")),
        node=node,
    )


def _states(status: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """States of the trainer's containers, by name."""
    return {each["name"]: each.get("state") or {} for each in status.get(kind) or [] if each.get("name") in CONTAINERS}


def _phase(status: Mapping[str, Any], last: Mapping[str, Any], *, running: bool) -> PodPhase:
    """The phase of the pod as far as the trainer's own containers go.

    last: how they ended, empty if they did not. running: whatever Kubernetes calls it, unless they have ended.
    """
    phase = status.get("phase", "Pending")
    if phase == "Running" and last:
        return PodPhase.FAILED if last.get("exitCode") else PodPhase.SUCCEEDED
    return PodPhase.RUNNING if running else PodPhase(phase)


def _lingering(status: Mapping[str, Any]) -> str:
    """A container that still runs; only those of others do once the trainer's have ended."""
    every = status.get("containerStatuses") or []
    return next((str(each["name"]) for each in every if "running" in (each.get("state") or {})), "")


def _started(state: Mapping[str, Any]) -> datetime | None:
    return _time((state.get("running") or state.get("terminated") or {}).get("startedAt"))


def _failure(ended: Mapping[str, Any]) -> Failure | None:
    with contextlib.suppress(ValidationError):
        return Failure.model_validate_json(ended.get("message") or "")
    return None


def _memory_limit(spec: Mapping[str, Any], name: str) -> str:
    """The memory limit of the container of that name; of the stage's own without one."""
    own = [each for each in (*(spec.get("initContainers") or []), *spec["containers"]) if each["name"] in CONTAINERS]
    container = next((each for each in own if each["name"] == name), own[-1] if own else {})
    limits = (container.get("resources") or {}).get("limits") or {}
    return str(limits.get("memory", ""))


def _waiting(name: str, body: Object) -> str:
    """Why a pending pod does not start; empty while it is starting normally."""
    status = body.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("reason") in UNSCHEDULED_REASONS:
            return f"Pod {name} cannot be scheduled: {condition.get('message', '')}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in STUCK_REASONS:
            return f"Pod {name} cannot start ({waiting['reason']}): {waiting.get('message') or container.get('image')}"
    return ""


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None
