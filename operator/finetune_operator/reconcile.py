"""observe → decide → record → act, for one job at a time. All writing of status is here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AttemptRecord, JobStatus
from finetune_operator.cluster.act import Actor
from finetune_operator.cluster.api import Api, ApiError, Object
from finetune_operator.cluster.needs import Needs, Prerequisites
from finetune_operator.cluster.observe import UNREADABLE, Seen, is_of, observe, read_spec
from finetune_operator.cluster.store import FINE_TUNE_JOB, Key, Store
from finetune_operator.cluster.watch import Watch
from finetune_operator.decision import attempts, progress
from finetune_operator.decision.conditions import next_stage, terminal
from finetune_operator.decision.decide import Planner, decide
from finetune_operator.decision.model import (
    CleanUp,
    Decision,
    DeleteChild,
    EnsureShared,
    Missing,
    Observation,
    StartAttempt,
)
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.names import child_name, shared_name
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings
from finetune_operator.sizing.plan import planner_for
from finetune_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

SECRET_POLL_SECONDS = 30.0
"""Secrets may be read by name and not watched: a job that waits for one asks again."""
RESYNC_SECONDS = 600.0
"""How often a job that has not ended is looked at although nothing was heard of it."""
DOUBT_SECONDS = 30.0
"""How long a job waits for something to go away before it is listed again, in case it went unheard; and before it is
asked again whether the node of a pod that does not go has been declared dead, since nodes are not watched."""
OUT_OF_SERVICE_TAINT = "node.kubernetes.io/out-of-service"


def utc_now() -> datetime:
    """The time, as the status writes it."""
    return datetime.now(UTC)


@dataclass
class Memory:
    """What this process remembers of a job; a fresh process does without."""

    written: datetime | None = None
    doubted: datetime | None = None
    """Since when it waits for something to go, or when that was last listed."""
    refused: Missing | None = None
    spec: tuple[str, FineTuneJobSpec, str] = ("", UNREADABLE, "")
    """Uid and generation that it was read from, the spec, and why it could not be read."""


@dataclass
class Reconciler:
    """Works the queue off."""

    api: Api
    store: Store
    settings: Settings
    metrics: Metrics
    planner: Planner | None = None
    """How the memory plan is made, if not as sizing/plan.py does."""
    backend: Backend = field(default_factory=PyTorchJobBackend)
    clock: Callable[[], datetime] = utc_now
    queue: WorkQueue[Key] = field(default_factory=WorkQueue)
    watches: Sequence[Watch] = ()
    """What keeps the store."""
    _memories: dict[Key, Memory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._actor = Actor(self.api, self.backend, self._made)
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
        """Reconcile a key; whatever goes wrong, it comes again."""
        try:
            again = await self.reconcile(key)
        except ApiError as error:
            if error.code != 409:
                self.metrics.reconcile_errors.inc()
                log.warning("the API server answered %s; tries again", error, extra=_about(key))
            self.queue.add_failed(key, error.retry_after or 0.0)
        except Exception:
            self.metrics.reconcile_errors.inc()
            log.exception("reconcile failed; tries again", extra=_about(key))
            self.queue.add_failed(key)
        else:
            self.queue.succeeded(key)
            if again is not None:
                self.queue.add_after(key, again)

    async def reconcile(self, key: Key) -> float | None:
        """Bring one job on by one decision; returns the seconds after which to look again."""
        job = self.store.job(key)
        if job is None:
            self._memories.pop(key, None)
            return None
        memory = self._memories.setdefault(key, Memory())
        seen = await self._observe(key, job, memory)
        planner = self.planner or planner_for(price_per_gpu_hour=seen.environment.price_per_gpu_hour)
        decision = decide(seen, planner)
        wrote = await self._record(key, job, seen, decision, memory)
        if decision.requeue_after == 0.0:
            return 0.0 if wrote else 1.0
        await self._act(key, seen, decision, memory)
        if await self._look_again(key, seen, decision, memory):
            return 0.0
        if terminal(decision.status):
            # Ten thousand specs would be a hundred megabytes, and nobody asks for them any more.
            self._memories.pop(key, None)
        return self._again(seen, decision, memory)

    async def _look_again(self, key: Key, seen: Observation, decision: Decision, memory: Memory) -> bool:
        """List what a job waits for to go, after a while and now and then; whether any of it had gone unheard."""
        if terminal(decision.status) or seen.deleting or not attempts.waits_for_the_old(seen, decision.status):
            memory.doubted = None
            return False
        memory.doubted = memory.doubted or seen.now
        if (seen.now - memory.doubted).total_seconds() < DOUBT_SECONDS:
            return False
        memory.doubted = seen.now
        return any([await watch.look_again(key) for watch in self.watches])

    async def _observe(self, key: Key, job: Object, memory: Memory) -> Observation:
        spec, invalid = self._spec(job, memory)
        name = job["metadata"]["name"]
        status = JobStatus.parse(job.get("status"))
        pods = self.store.of("Pod", key)
        await self._catch_up(key, job, status, pods)
        needs = Needs() if invalid else await self._needs(key, job, status, spec)
        refused = (memory.refused,) if memory.refused is not None else ()
        carriers = [*self.store.of("Job", key), *self.store.of(self.backend.kind, key)]
        seen = Seen(
            job=job,
            spec=spec,
            invalid=invalid,
            carriers=tuple(carriers),
            pods=pods,
            report=self.store.named("ConfigMap", key, shared_name(name, "report")),
            out_of_service=await self._out_of_service(pods),
            missing=(*needs.missing, *refused),
            credentials_version=needs.credentials_version,
            environment=self.settings.environment(spec),
        )
        return observe(seen, self.backend, self.clock())

    def _spec(self, job: Object, memory: Memory) -> tuple[FineTuneJobSpec, str]:
        meta = job["metadata"]
        version = f"{meta['uid']}/{meta.get('generation')}"
        if memory.spec[0] != version:
            memory.spec = (version, *read_spec(job))
        return memory.spec[1], memory.spec[2]

    async def _needs(self, key: Key, job: Object, status: JobStatus, spec: FineTuneJobSpec) -> Needs:
        """Ask for Secrets and claims, where the answer may matter: before a child is made, and while publishing."""
        stage = next_stage(status, spec)
        if stage is None or terminal(status) or spec.suspend or "deletionTimestamp" in job["metadata"]:
            return Needs()
        if not progress.waits_on_credentials(stage) and self._has_child(key, job, status):
            return Needs()
        return await self._prerequisites.look(key.namespace, spec, stage, self.clock())

    def _has_child(self, key: Key, job: Object, status: JobStatus) -> bool:
        record = attempts.live(status)
        return record is not None and self.store.holds(*self._child(key, job, record))

    def _child(self, key: Key, job: Object, record: AttemptRecord) -> tuple[str, Key, str]:
        """Kind, key and name of an attempt's child."""
        kind = self.backend.kind if record.stage is Stage.TRAIN else "Job"
        return kind, key, child_name(job["metadata"]["name"], record.stage, record.number)

    async def _catch_up(self, key: Key, job: Object, status: JobStatus, pods: tuple[Object, ...]) -> None:
        """Pods of the running attempt may be heard of before their owner is: it is then asked for, not given up."""
        record = attempts.live(status)
        if record is None or not any(is_of(pod, job, record) for pod in pods):
            return
        kind, _, name = self._child(key, job, record)
        if not self.store.holds(kind, key, name):
            body = await self.api.find(kind, key.namespace, name)
            if body is not None:
                self.store.put(kind, body)

    def _made(self, body: Object) -> None:
        """What we made ourselves is known at once: its pods may be seen before its own watch has told it."""
        if body["kind"] in ("Job", self.backend.kind, "ConfigMap"):
            self.store.put(body["kind"], body)

    async def _out_of_service(self, pods: tuple[Object, ...]) -> frozenset[str]:
        """Nodes of terminating pods that are declared dead; not to be allowed to read nodes means none are known."""
        nodes = {
            pod["spec"]["nodeName"]
            for pod in pods
            if "deletionTimestamp" in pod["metadata"] and pod["spec"].get("nodeName")
        }
        found = set()
        for node in nodes:
            try:
                body = await self.api.find("Node", "", node)
            except ApiError as error:
                if error.code != 403:
                    raise
                continue
            if body is not None and _is_out_of_service(body):
                found.add(node)
        return frozenset(found)

    async def _record(self, key: Key, job: Object, seen: Observation, decision: Decision, memory: Memory) -> bool:
        """Write the status if that is worth it, tell its Events; whether it was written."""
        if not progress.worth_writing(seen, decision, memory.written):
            return False
        meta = {name: job["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        body = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": FINE_TUNE_JOB,
            "metadata": meta,
            "spec": job["spec"],
            "status": decision.wire,
        }
        try:
            answer = await self.api.replace_status(body)
        except ApiError as error:
            if error.code == 404:
                # Deleted while the watch was broken.
                self.store.drop(FINE_TUNE_JOB, job)
            raise
        # The watch may be slow: what we wrote ourselves is known at once, and its echo is no news.
        self.store.put(FINE_TUNE_JOB, answer)
        memory.written = seen.now
        self.metrics.count_transition(seen.namespace, seen.status, decision.status)
        for event in decision.events:
            log.info("%s: %s", event.reason, event.message, extra=_about(key))
            await self._actor.tell(seen, event, seen.now)
        return True

    async def _act(self, key: Key, seen: Observation, decision: Decision, memory: Memory) -> None:
        before, memory.refused = memory.refused, None
        for action in decision.actions:
            match action:
                case StartAttempt(attempt):
                    config = self.store.named("ConfigMap", key, shared_name(seen.name, "config"))
                    refused = await self._actor.start(seen, attempt, config)
                    memory.refused = before if _same(before, refused) else refused
                    log.info("starts %s%s", attempt.id, " in vain" if refused else "", extra=_about(key, attempt.id))
                case DeleteChild(stage, number, why):
                    log.info("deletes %s %d: %s", stage, number, why, extra=_about(key))
                    await self._actor.delete_child(seen, stage, number)
                case CleanUp():
                    await self._actor.clean_up(seen)
                case EnsureShared():
                    # Made together with the first attempt's child, for which it is needed.
                    pass

    def _again(self, seen: Observation, decision: Decision, memory: Memory) -> float | None:
        wants = [seconds for seconds in (decision.requeue_after,) if seconds is not None]
        if memory.refused is None and any(isinstance(action, StartAttempt) for action in decision.actions):
            # What was made is in the store already, so that its event is no news: the deadlines run from now.
            wants.append(1.0)
        if memory.refused is not None and not any(missing == memory.refused for missing in seen.missing):
            # Newly refused: say so now.
            wants.append(0.05)
        if seen.missing or decision.status.credentials_seen:
            wants.append(SECRET_POLL_SECONDS)
        if decision.wire != seen.wire:
            wants.append(float(progress.WRITE_INTERVAL_SECONDS))
        if not terminal(decision.status):
            wants.append(DOUBT_SECONDS if attempts.waits_for_the_old(seen, decision.status) else RESYNC_SECONDS)
        return min(wants) if wants else None


def _same(before: Missing | None, now: Missing | None) -> bool:
    """Whether it is the same thing that is in the way: its sentence may count something that changes all the time."""
    return before is not None and now is not None and (before.kind, before.name) == (now.kind, now.name)


def _is_out_of_service(node: Object) -> bool:
    return any(taint.get("key") == OUT_OF_SERVICE_TAINT for taint in node.get("spec", {}).get("taints") or [])


def _about(key: Key, attempt: str = "") -> dict[str, str]:
    return {"job": f"{key.namespace}/{key.label}", "attempt": attempt}
