"""An API server in memory with the controllers that matter, and an operator that stops or stumbles at any request."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.unit.finetune_operator.decision.world import SPEC, plan
from tests.unit.finetune_operator.decision.world import job as world

from finetune_api.base import Stage
from finetune_api.report import Failure, FailureClass, Plan, Report
from finetune_api.runconfig import Attempt
from finetune_api.status import JobStatus
from finetune_operator.cluster.api import ApiError, Object
from finetune_operator.cluster.store import FINE_TUNE_JOB, Key, Store
from finetune_operator.handlers import watches
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.metrics import Metrics
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue

KEY = Key("ml", "support")
FAR = datetime(2100, 1, 1, tzinfo=UTC)
CHILD_KINDS = ("Job", "PyTorchJob")
WATCHED = ("Job", "PyTorchJob", "Pod", "ConfigMap", FINE_TUNE_JOB)


def copied(body: Any) -> Any:
    """A copy that shares nothing, in a fraction of the time of `deepcopy`."""
    return pickle.loads(pickle.dumps(body, pickle.HIGHEST_PROTOCOL))


class FixedPlan:
    """Gives every run the same plan."""

    async def plan(self, *facts: object) -> Plan:
        return plan()


class Killed(BaseException):
    """The operator's process ends here."""


Fault = Callable[[int, str, str], BaseException | None]
"""Given the number of the request, its verb and whether it is `before` or `after` it was carried out."""


class FakeCluster:
    """Objects, their controllers, and a trainer that does what `script` says (succeeds, by default)."""

    def __init__(self, spec: dict[str, object] | None = None) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda number, verb, when: None
        self.script: Callable[[Attempt, int], str | None] = lambda attempt, rank: None
        self.gate_passes = True
        self.uploads: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self.unheard: frozenset[str] = frozenset()
        """Kinds whose deletions the watches miss."""
        self.late: dict[str, int] = {}
        """Seconds after which the watches tell of a new object of a kind, if not at once."""
        self.backend: Backend = PyTorchJobBackend()
        self._versions = itertools.count(1)
        self._put({"kind": "PersistentVolumeClaim", "metadata": {"name": "finetune-cache", "namespace": "ml"}})
        meta = {"name": "support", "namespace": "ml", "generation": 1}
        self._put(
            {"apiVersion": "finetune.dev/v1alpha1", "kind": FINE_TUNE_JOB, "metadata": meta, "spec": spec or SPEC}
        )

    # What the operator asks

    async def find(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._asked("get", kind, lambda: copied(self.objects.get((kind, name))))

    async def list(self, kind: str, namespace: str, labels: str) -> list[Object]:
        wanted = dict(part.split("=") for part in labels.split(","))
        return self._asked(
            "list",
            kind,
            lambda: [copied(o) for o in self.of(kind) if wanted.items() <= o["metadata"]["labels"].items()],
        )

    async def pages(self, kind: str, namespace: str, labels: str, size: int) -> AsyncIterator[Object]:
        found = await self.list(kind, namespace, labels)
        yield {"metadata": {"resourceVersion": str(next(self._versions))}, "items": found}

    async def create(self, made: Object) -> Object:
        return self._asked("create", made["kind"], lambda: self._create(made))

    async def replace_status(self, changed: Object) -> Object:
        return self._asked("update", changed["kind"], lambda: self._replace_status(changed))

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        self._asked("delete", kind, lambda: self.objects.pop((kind, name), None))

    def _asked(self, verb: str, kind: str, carry_out: Callable[[], Any]) -> Any:
        number = len(self.requests)
        self.requests.append((verb, kind))
        self._fail(number, verb, "before")
        answer = carry_out()
        self._fail(number, verb, "after")
        return answer

    def _fail(self, number: int, verb: str, when: str) -> None:
        error = self.fault(number, verb, when)
        if error is not None:
            raise error

    def _create(self, made: Object) -> Object:
        name = made["metadata"].get("name")
        if (made["kind"], name) in self.objects:
            raise ApiError(409, "AlreadyExists", name)
        if made["kind"] in CHILD_KINDS:
            alive = [o for kind in CHILD_KINDS for o in self.of(kind) if not o.get("status")]
            assert not alive, f"{name} is made while {alive[0]['metadata']['name']} lives"
        return copied(self._put(copied(made)))

    def _replace_status(self, changed: Object) -> Object:
        stored = self.objects[changed["kind"], changed["metadata"]["name"]]
        if changed["metadata"]["resourceVersion"] != stored["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "")
        stored["status"] = copied(changed["status"])
        return copied(self._touch(stored))

    def _put(self, made: Object) -> Object:
        made["born"] = self.now
        made["metadata"]["uid"] = f"uid-{next(self._versions)}"
        self.objects[made["kind"], made["metadata"].get("name", made["metadata"]["uid"])] = made
        return self._touch(made)

    def _touch(self, stored: Object) -> Object:
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        return stored

    # What is there

    def of(self, kind: str) -> list[Object]:
        return [o for (k, _), o in self.objects.items() if k == kind]

    @property
    def status(self) -> JobStatus:
        return JobStatus.parse(self.objects[FINE_TUNE_JOB, "support"].get("status"))

    def is_true(self, kind: str) -> bool:
        return any(c.type == kind and c.status == "True" for c in self.status.conditions)

    # What the cluster does by itself

    def tick(self) -> None:
        """A second passes: controllers make pods, pods run and end as the script says, orphans go."""
        self.now += timedelta(seconds=1)
        for kind in CHILD_KINDS:
            for child in self.of(kind):
                self._play(child)
        owners = {child["metadata"]["uid"] for kind in CHILD_KINDS for child in self.of(kind)}
        for pod in self.of("Pod"):
            if pod["owner"] not in owners:
                del self.objects["Pod", pod["metadata"]["name"]]

    def _play(self, child: Object) -> None:
        pods = [pod for pod in self.of("Pod") if pod["owner"] == child["metadata"]["uid"]]
        if not pods:
            self._make_pods(child)
        elif not child.get("status"):
            for rank, pod in enumerate(pods):
                self._run(pod, rank)
            phases = {pod["status"]["phase"] for pod in pods}
            if phases <= {"Succeeded", "Failed"}:
                self._conclude(child, failed="Failed" in phases)

    def _make_pods(self, child: Object) -> None:
        gang = child["spec"].get("pytorchReplicaSpecs", {}).get("Worker")
        template, count = (gang["template"], gang["replicas"]) if gang else (child["spec"]["template"], 1)
        for rank in range(count):
            labels = template["metadata"]["labels"] | {"training.kubeflow.org/replica-index": str(rank)}
            owner = child["metadata"]["uid"]
            owners = [{"kind": child["kind"], "uid": owner, "controller": True}]
            name = f"{child['metadata']['name']}-{rank}"
            meta = {"name": name, "namespace": "ml", "labels": labels, "ownerReferences": owners}
            spec = copied(template["spec"])
            self._put({"kind": "Pod", "metadata": meta, "spec": spec, "status": {"phase": "Pending"}, "owner": owner})

    def _run(self, pod: Object, rank: int) -> None:
        phase = pod["status"]["phase"]
        begun = {"startedAt": f"{self.now:%Y-%m-%dT%H:%M:%SZ}"}
        if phase == "Pending":
            pod["status"] = {
                "phase": "Running",
                "containerStatuses": [{"name": _main(pod), "state": {"running": begun}}],
            }
        elif phase == "Running":
            self._end(pod, rank)
        self._touch(pod)

    def _end(self, pod: Object, rank: int) -> None:
        environment = {v["name"]: v.get("value", "") for v in pod["spec"]["containers"][0]["env"]}
        attempt = Attempt.model_validate_json(environment["FINETUNE_ATTEMPT"])
        kind = self.script(attempt, rank)
        message = ""
        if kind is not None:
            failure = Failure(failure_class=FailureClass(kind), sentence=f"{kind}.", rank=rank, time=self.now)
            message = failure.model_dump_json(by_alias=True, exclude_none=True)
        elif rank == 0:
            self._report(attempt)
        ended = {
            "exitCode": 0 if kind is None else 1,
            "message": message,
            "finishedAt": f"{self.now:%Y-%m-%dT%H:%M:%SZ}",
        }
        phase = "Succeeded" if kind is None else "Failed"
        pod["status"] = {"phase": phase, "containerStatuses": [{"name": _main(pod), "state": {"terminated": ended}}]}

    def _report(self, attempt: Attempt) -> None:
        given = world()
        given.gate_passes = self.gate_passes
        product = given.product(attempt.stage) | ({"plan": plan()} if attempt.stage is Stage.PREPARE else {})
        report = Report.model_validate(
            {"attempt": attempt.id, "stage": attempt.stage, "time": self.now, "done": True, **product}
        )
        if attempt.stage is Stage.PUBLISH:
            self.uploads.append(attempt.id)
        text = report.model_dump_json(by_alias=True, exclude_none=True)
        self.patch_data(f"support-{attempt.stage}-report", {str(attempt.stage): text})

    def patch_data(self, name: str, data: dict[str, str]) -> None:
        """Patch a ConfigMap as a pod can; its keys come sorted from the API server."""
        config_map = self.objects["ConfigMap", name]
        config_map["data"] = dict(sorted((config_map.get("data", {}) | data).items()))
        self._touch(config_map)

    def _conclude(self, child: Object, *, failed: bool) -> None:
        words = {"Job": ("Complete", "Failed"), "PyTorchJob": ("Succeeded", "Failed")}[child["kind"]]
        child["status"] = {"conditions": [{"type": words[failed], "status": "True", "reason": "Ended"}]}
        self._touch(child)

    # The operator

    def operator(self) -> Reconciler:
        """A fresh process: nothing remembered, everything listed."""
        store, queue = Store(), WorkQueue[Key]()
        made = Reconciler(
            api=self,  # type: ignore[arg-type]
            store=store,
            queue=queue,
            backend=self.backend,
            watches=watches(self, store, queue, self.backend, ()),  # type: ignore[arg-type]
            settings=Settings(backoff_base_seconds=1.0),
            metrics=Metrics(),
            planner=FixedPlan(),
            clock=lambda: self.now,
        )
        self.show(made.store)
        return made

    def show(self, store: Store) -> bool:
        """Bring a store up to date, as the watches do; whether there was anything to tell."""
        told = False
        for kind in WATCHED:
            known = {body["metadata"]["name"]: body for body in store.of(kind, KEY)}
            there = {body["metadata"]["name"]: body for body in self.of(kind)}
            for name in known.keys() - there.keys() if kind not in self.unheard else ():
                store.drop(kind, known[name])
                told = True
            heard = self.now - timedelta(seconds=self.late.get(kind, 0))
            for name, body in there.items():
                if body["born"] > heard:
                    continue
                version = body["metadata"]["resourceVersion"]
                if name not in known or known[name]["metadata"]["resourceVersion"] != version:
                    store.put(kind, copied(body))
                    told = True
        return told

    async def carry_on(self, seconds: int = 200) -> None:
        """Seconds pass until the job has ended; a killed operator is followed by a fresh one.

        Reconciled is only when something was heard, when the operator wanted to look again, and after a refusal.
        """
        operator, due = self.operator(), self.now
        for _ in range(seconds):
            try:
                while self.show(operator.store) or self.now >= due:
                    again = await operator.reconcile(KEY)
                    due = self.now + timedelta(seconds=again) if again is not None else FAR
            except Killed:
                operator, due = self.operator(), self.now
            except ApiError as error:
                self.refused.append((error.reason, error.message))
                due = self.now + timedelta(seconds=1)
            if self.is_true("Complete") or self.is_true("Failed"):
                return
            self.tick()
        raise AssertionError(f"stuck: {self.status.phase}: {self.status.conditions[0].message}")


def _main(pod: Object) -> str:
    return str(pod["spec"]["containers"][0]["name"])
