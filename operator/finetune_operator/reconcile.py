"""observe → decide → record → act, for one job at a time. All writing of status is here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from finetune_api.base import API_VERSION, STAGES, Stage
from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AttemptRecord, JobStatus
from finetune_operator.cluster.act import Actor
from finetune_operator.cluster.api import Api, ApiError, Object
from finetune_operator.cluster.needs import Needs, Prerequisites
from finetune_operator.cluster.observe import UNREADABLE, JobObjects, is_of, observe, read_spec, read_status
from finetune_operator.cluster.store import FINE_TUNE_JOB, Key, Store
from finetune_operator.cluster.watch import Watch
from finetune_operator.decision import attempts, progress
from finetune_operator.decision.conditions import next_stage, terminal
from finetune_operator.decision.decide import decide
from finetune_operator.decision.model import (
    CleanUp,
    Decision,
    DeleteChild,
    EnsureShared,
    Missing,
    Observation,
    PlanFailure,
    StartAttempt,
)
from finetune_operator.decision.next_attempt import plan_inputs
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.names import channel_name, child_name, shared_name
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

UNWRITTEN_RETRY_SECONDS = 1.0
"""How soon to decide again when a status of new wording was not written yet, to limit writes."""
STARTED_SECONDS = 1.0
"""How soon to look again after a start: what was created is in the store already, so that its event is no news."""
REFUSED_SECONDS = 0.05
"""How soon to decide again when a start was refused for a new reason, to write it to the status."""
SECRET_POLL_SECONDS = 30.0
"""How often a job that waits for a Secret looks again: Secrets can be read by name but not watched."""
RESYNC_SECONDS = 600.0
"""How often a job that has not ended is reconciled although no event came."""
RELIST_SECONDS = 30.0
"""How long a job waits for something to be deleted before that is listed again, in case the event was missed; and
before the node of a pod that does not terminate is read again, since nodes are not watched."""
OUT_OF_SERVICE_TAINT = "node.kubernetes.io/out-of-service"


def utc_now() -> datetime:
    """The time, as the status writes it."""
    return datetime.now(UTC)


class MemoryPlanner(Protocol):
    """Makes memory plans without holding up the event loop."""

    async def plan(
        self, spec: FineTuneJobSpec, model: ModelFacts, lengths: LengthFacts, price_per_gpu_hour: float | None
    ) -> Plan | PlanFailure:
        """The plan of a run, or why there is none."""


@dataclass
class JobCache:
    """What this process remembers of a job; a fresh process does without."""

    last_write: datetime | None = None
    last_relist: datetime | None = None
    """When what the job waits to be deleted was last listed, or since when it waits."""
    refused: Missing | None = None
    """Why the API server refused the last start."""
    plan: tuple[tuple[FineTuneJobSpec, tuple[ModelFacts, LengthFacts]], Plan | PlanFailure] | None = None
    """What the memory plan was made from, and the plan."""
    spec: tuple[str, FineTuneJobSpec, str] = ("", UNREADABLE, "")
    """Uid and generation that it was read from, the spec, and why it could not be read."""


@dataclass
class Reconciler:
    """Reconciles the jobs in the queue."""

    api: Api
    store: Store
    settings: Settings
    metrics: Metrics
    planner: MemoryPlanner
    backend: Backend = field(default_factory=PyTorchJobBackend)
    clock: Callable[[], datetime] = utc_now
    queue: WorkQueue[Key] = field(default_factory=WorkQueue)
    watches: Sequence[Watch] = ()
    """The watches that keep the store up to date."""
    _caches: dict[Key, JobCache] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._actor = Actor(self.api, self.backend, self._store_created)
        self._prerequisites = Prerequisites(self.api)

    async def run(self) -> None:
        """Serve the queue with as many workers as are set, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self.settings.workers):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            self.metrics.queue_depth.set(self.queue.depth)
            begun = time.perf_counter()
            try:
                await self._serve(key)
            finally:
                self.metrics.reconcile_seconds.observe(time.perf_counter() - begun)
                self.queue.done(key)

    async def _serve(self, key: Key) -> None:
        """Reconcile a key; whatever goes wrong, it is queued again."""
        try:
            seconds = await self.reconcile(key)
        except ApiError as error:
            if error.code != 409:
                self.metrics.reconcile_errors.inc()
                log.warning("the API server answered %s; retrying", error, extra=_about(key))
            self.queue.add_failed(key, error.retry_after or 0.0)
        except Exception:
            self.metrics.reconcile_errors.inc()
            log.exception("reconcile failed; retrying", extra=_about(key))
            self.queue.add_failed(key)
        else:
            self.queue.succeeded(key)
            if seconds is not None:
                self.queue.add_after(key, seconds)

    async def reconcile(self, key: Key) -> float | None:
        """Carry out one decision for a job; returns the seconds after which to reconcile it again."""
        job = self.store.job(key)
        if job is None:
            self._caches.pop(key, None)
            return None
        cache = self._caches.setdefault(key, JobCache())
        observation = await self._observe(key, job, cache)
        observation = await self._with_plan(observation, cache)
        decision = decide(observation)
        written = await self._record(key, job, observation, decision, cache)
        stale = False
        if decision.settled:
            await self._act(key, observation, decision, cache)
            stale = await self._relist(key, observation, decision, cache)
            if terminal(decision.status):
                # Ten thousand specs would be a hundred megabytes, and nobody reads them any more.
                self._caches.pop(key, None)
        return _requeue_after(observation, decision, cache, written, stale)

    async def _relist(self, key: Key, observation: Observation, decision: Decision, cache: JobCache) -> bool:
        """List what a job waits to be deleted, now and then; whether the store missed a deletion."""
        if not decision.waits_for_removal:
            cache.last_relist = None
            return False
        cache.last_relist = cache.last_relist or observation.now
        if (observation.now - cache.last_relist).total_seconds() < RELIST_SECONDS:
            return False
        cache.last_relist = observation.now
        return any([await watch.look_again(key) for watch in self.watches])

    async def _with_plan(self, observation: Observation, cache: JobCache) -> Observation:
        """Have the plan made that the decision needs, once for each spec and what Prepare found."""
        inputs = plan_inputs(observation)
        if inputs is None:
            return observation
        made_from = (observation.spec, inputs)
        if cache.plan is None or cache.plan[0] != made_from:
            price = observation.environment.price_per_gpu_hour
            cache.plan = made_from, await self.planner.plan(observation.spec, *inputs, price)
        return replace(observation, plan=cache.plan[1])

    async def _observe(self, key: Key, job: Object, cache: JobCache) -> Observation:
        spec, invalid = self._spec(job, cache)
        name = job["metadata"]["name"]
        status, unreadable = read_status(job)
        if unreadable:
            log.error("the status cannot be read, and the job is left alone: %s", unreadable, extra=_about(key))
        pods = self.store.of("Pod", key)
        await self._catch_up(key, job, status, pods)
        needs = Needs() if invalid else await self._needs(key, job, status, spec)
        refused = (cache.refused,) if cache.refused is not None else ()
        seen = JobObjects(
            job=job,
            spec=spec,
            invalid=invalid,
            carriers=(*self.store.of("Job", key), *self.store.of(self.backend.kind, key)),
            pods=pods,
            channels={stage: self._channel(key, name, stage) for stage in STAGES},
            out_of_service=await self._out_of_service(pods),
            missing=(*needs.missing, *refused),
            credentials_version=needs.credentials_version,
            environment=self.settings.environment(spec),
        )
        return observe(seen, self.backend, self.clock())

    def _channel(self, key: Key, name: str, stage: Stage) -> Object | None:
        """The ConfigMap that a stage of a job reports into."""
        return self.store.named("ConfigMap", key, channel_name(name, stage))

    def _spec(self, job: Object, cache: JobCache) -> tuple[FineTuneJobSpec, str]:
        meta = job["metadata"]
        version = f"{meta['uid']}/{meta.get('generation')}"
        if cache.spec[0] != version:
            cache.spec = (version, *read_spec(job))
        return cache.spec[1], cache.spec[2]

    async def _needs(self, key: Key, job: Object, status: JobStatus, spec: FineTuneJobSpec) -> Needs:
        """Look for Secrets and claims where it matters: before a child is created, and throughout Publish."""
        stage = next_stage(status, spec)
        if stage is None or terminal(status) or spec.suspend or "deletionTimestamp" in job["metadata"]:
            return Needs()
        record = attempts.running(status)
        if stage is not Stage.PUBLISH and record and self.store.holds(*self._child(key, job, record)):
            return Needs()
        return await self._prerequisites.look(key.namespace, spec, stage, self.clock())

    def _child(self, key: Key, job: Object, record: AttemptRecord) -> tuple[str, Key, str]:
        """Kind, key and name of an attempt's child."""
        kind = self.backend.kind if record.stage is Stage.TRAIN else "Job"
        return kind, key, child_name(job["metadata"]["name"], record.stage, record.number)

    async def _catch_up(self, key: Key, job: Object, status: JobStatus, pods: tuple[Object, ...]) -> None:
        """Read the running attempt's child if the store has pods of it but not itself: their events may come first."""
        record = attempts.running(status)
        if record is None or not any(is_of(pod, job, record) for pod in pods):
            return
        kind, _, name = self._child(key, job, record)
        if not self.store.holds(kind, key, name):
            body = await self.api.find(kind, key.namespace, name)
            if body is not None:
                self.store.put(kind, body)

    def _store_created(self, body: Object) -> None:
        """Store what we created at once: the events of its pods may come before its own."""
        if body["kind"] in ("Job", self.backend.kind, "ConfigMap"):
            self.store.put(body["kind"], body)

    async def _out_of_service(self, pods: tuple[Object, ...]) -> frozenset[str]:
        """Nodes of terminating pods that are marked out of service; none if we may not read nodes."""
        nodes = {
            pod["spec"]["nodeName"]
            for pod in pods
            if "deletionTimestamp" in pod["metadata"] and pod["spec"].get("nodeName")
        }
        out_of_service = set()
        for node in nodes:
            try:
                body = await self.api.find("Node", "", node)
            except ApiError as error:
                if error.code != 403:
                    raise
                continue
            if body is not None and any(
                taint.get("key") == OUT_OF_SERVICE_TAINT for taint in body.get("spec", {}).get("taints") or []
            ):
                out_of_service.add(node)
        return frozenset(out_of_service)

    async def _record(
        self, key: Key, job: Object, observation: Observation, decision: Decision, cache: JobCache
    ) -> bool:
        """Write the status, if it should be now, and emit its Events; whether it was written."""
        if not progress.should_write_status(observation, decision, cache.last_write):
            return False
        meta = {name: job["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        head = {"apiVersion": API_VERSION, "kind": FINE_TUNE_JOB, "metadata": meta}
        try:
            answer = await self.api.replace_status({**head, "spec": job["spec"], "status": decision.wire})
        except ApiError as error:
            if error.code == 404:
                # Deleted while the watch was broken.
                self.store.drop(FINE_TUNE_JOB, job)
            raise
        # The watch may be slow: store what we wrote at once; its echo is then no news.
        self.store.put(FINE_TUNE_JOB, answer)
        cache.last_write = observation.now
        self.metrics.count_transition(observation.namespace, observation.status, decision.status)
        for event in decision.events:
            log.info("%s: %s", event.reason, event.message, extra=_about(key))
            await self._actor.tell(observation, event, observation.now)
        return True

    async def _act(self, key: Key, observation: Observation, decision: Decision, cache: JobCache) -> None:
        before, cache.refused = cache.refused, None
        for action in decision.actions:
            match action:
                case StartAttempt(attempt):
                    config = self.store.named("ConfigMap", key, shared_name(observation.name, "config"))
                    channel = self._channel(key, observation.name, attempt.stage)
                    refused = await self._actor.start(observation, attempt, config, channel)
                    cache.refused = before if _same(before, refused) else refused
                    outcome = "start refused:" if refused else "started"
                    log.info("%s %s", outcome, attempt.id, extra=_about(key, attempt.id))
                case DeleteChild(stage, number, why):
                    log.info("deleting %s attempt %d: %s", stage, number, why, extra=_about(key))
                    await self._actor.delete_child(observation, stage, number)
                case CleanUp():
                    await self._actor.clean_up(observation)
                case EnsureShared():
                    # Created together with the first attempt's child, which needs it.
                    pass


def _requeue_after(
    observation: Observation, decision: Decision, cache: JobCache, written: bool, stale: bool
) -> float | None:
    """Seconds after which to reconcile a job again although no event comes; None for never. The one place for this.

    written: whether the decision's status was written. stale: whether the store had missed a deletion.
    """
    if not decision.settled:
        return 0.0 if written else UNWRITTEN_RETRY_SECONDS
    if stale:
        return 0.0
    seconds = [] if decision.requeue_after is None else [decision.requeue_after]
    if cache.refused is None and any(isinstance(action, StartAttempt) for action in decision.actions):
        seconds.append(STARTED_SECONDS)
    if cache.refused is not None and cache.refused not in observation.missing:
        seconds.append(REFUSED_SECONDS)
    if observation.missing or decision.status.credentials_seen:
        seconds.append(SECRET_POLL_SECONDS)
    if decision.wire != observation.wire:
        seconds.append(float(progress.WRITE_INTERVAL_SECONDS))
    if not terminal(decision.status):
        seconds.append(RELIST_SECONDS if decision.waits_for_removal else RESYNC_SECONDS)
    return min(seconds, default=None)


def _same(before: Missing | None, now: Missing | None) -> bool:
    """Whether the refusal is the same; but for what is in the way, its sentence may contain numbers that change."""
    if before is None or now is None or now.kind == "Leftover":
        return before == now
    return (before.kind, before.name) == (now.kind, now.name)


def _about(key: Key, attempt: str = "") -> dict[str, str]:
    return {"job": f"{key.namespace}/{key.label}", "attempt": attempt}
