"""Turns the API server's objects into an Observation. Pure: it receives objects and reads none."""

from __future__ import annotations

import contextlib
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
        "ImagePullBackOff",
        "InvalidImageName",
        "ImageInspectError",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    }
)
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
        succeeded=state.succeeded,
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
    phases = {pod.phase for pod in pods}
    return Child(
        stage,
        number,
        ours=ours,
        foreign=kind,
        succeeded=phases == {PodPhase.SUCCEEDED},
        failed=PodPhase.FAILED in phases,
        pods=pods,
        pods_expected=len(pods),
    )


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
    phase, lost = _phase(status)
    disruption = condition_of(body, "DisruptionTarget")
    reason = (disruption or {}).get("reason", "")
    main = next((c.get("state") or {} for c in status.get("containerStatuses") or []), {})
    ended = _ended_states(status)
    failed_container, failed = next(((name, end) for name, end in ended if end.get("exitCode")), ("", None))
    waiting = _waiting(meta["name"], body) if phase is PodPhase.PENDING else ""
    began = _began(body)
    if phase is PodPhase.PENDING and began is not None and not waiting:
        phase = PodPhase.RUNNING
    node = spec.get("nodeName", "")
    return Pod(
        name=meta["name"],
        node_rank=node_rank(meta.get("labels") or {}),
        phase=phase,
        terminating="deletionTimestamp" in meta,
        evicted=status.get("reason") == "Evicted" or (disruption is not None and reason not in NODE_LOST_REASONS),
        node_lost=lost or reason in NODE_LOST_REASONS,
        out_of_service=node in out_of_service,
        oom_killed=any(end.get("reason") == "OOMKilled" for _, end in ended),
        memory_limit=_memory_limit(spec, failed_container),
        exit_code=(failed or main.get("terminated") or {}).get("exitCode"),
        failure=next((failure for _, end in ended if (failure := _failure(end)) is not None), None),
        waiting=waiting,
        started=began or _started(main),
        finished=_time((failed or main.get("terminated") or {}).get("finishedAt")),
        node=node,
    )


def _phase(status: Mapping[str, Any]) -> tuple[PodPhase, bool]:
    phase = status.get("phase", "Pending")
    if phase == "Unknown" or status.get("reason") == "NodeLost":
        return PodPhase.RUNNING, True
    return PodPhase(phase), False


def _began(body: Object) -> datetime | None:
    """When the first of the programs before the stage's own began; None if there are none, or none has begun.

    They run in init containers, during which Kubernetes calls the pod Pending. Init containers of others (a service
    mesh has some) are no part of the attempt.
    """
    key, statuses = _key(body), (body.get("status") or {}).get("initContainerStatuses") or []
    ours = {program.name for program in PROGRAMS[key[1]]} if key is not None else set()
    times = (_started(one.get("state") or {}) for one in statuses if one.get("name") in ours)
    return min(filter(None, times), default=None)


def _started(state: Mapping[str, Any]) -> datetime | None:
    return _time((state.get("running") or state.get("terminated") or {}).get("startedAt"))


def _ended_states(status: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """How containers ended, by name, initial ones first: they run programs of the stage, too."""
    every = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    ended = ((str(container.get("name", "")), (container.get("state") or {}).get("terminated")) for container in every)
    return [(name, end) for name, end in ended if end]


def _failure(ended: Mapping[str, Any]) -> Failure | None:
    with contextlib.suppress(ValidationError):
        return Failure.model_validate_json(ended.get("message") or "")
    return None


def _memory_limit(spec: Mapping[str, Any], name: str) -> str:
    """The memory limit of the container of that name; of the stage's own without one."""
    every = [*(spec.get("initContainers") or []), *spec["containers"]]
    container = next((each for each in every if each["name"] == name), spec["containers"][0])
    limits = (container.get("resources") or {}).get("limits") or {}
    return str(limits.get("memory", ""))


def _waiting(name: str, body: Object) -> str:
    """Why a pending pod does not start; empty while it is starting normally."""
    status = body.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return f"Pod {name} cannot be scheduled: {condition.get('message', '')}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in STUCK_REASONS:
            return f"Pod {name} cannot start ({waiting['reason']}): {waiting.get('message') or container.get('image')}"
    return ""


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None
