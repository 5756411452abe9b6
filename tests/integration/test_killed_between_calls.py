"""The operator killed between any two calls, and an API server that fails in every way it can: the job goes on.

A proxy in front of the API server kills the operator at its k-th request, before the server hears of it or after the
server has acted; a fresh one takes over. Several namespaces at a time, in each one job after the other; the operator
that ends one job is the one that is killed in the next.
"""

from __future__ import annotations

import itertools
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from finetune_api.base import Stage
from finetune_api.crd import definition
from finetune_api.report import Failure, FailureClass

from .harness import binaries
from .harness.api import Api, Resource
from .harness.control_plane import ControlPlane
from .harness.fake_kubelet import Exit, FakeKubelet
from .harness.fault_proxy import Call, Delay, Done, EndWatch, Fault, Kill, Lose, Plan, Refuse
from .harness.forked import Life, Nursery
from .harness.operator import Trainer, attempt_of, fine_tune_job, furnish, is_true
from .harness.processes import wait_until

NAMESPACES = 4
"""Jobs that are carried at a time: most of the time of each is waiting for the real controllers."""
ENDS_WITHIN_SECONDS = 120
"""Some ten seconds on an idle machine; the longest seen with four times the load was 26."""
MANAGED = "app.kubernetes.io/managed-by=finetune-operator"
MEASURED = frozenset({"activeSeconds", "gpuHours", "price"})
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")
HAPPY = [
    ("prepare", 1, "succeeded"),
    ("train", 1, "succeeded"),
    ("evaluate", 1, "succeeded"),
    ("publish", 1, "succeeded"),
]
TOLD = ["AttemptStarted", "Prepared", "Trained", "Evaluated", "Published", "Complete"]
"""Events of a happy run, in order."""
RETRIED = [HAPPY[0], ("train", 1, "failed"), ("train", 2, "succeeded"), *HAPPY[2:]]


class Nodes:
    """Kubelet and trainer of all namespaces. Train crashes once in jobs named `retried-…`, runs on in `running-…`."""

    def __init__(self, api: Api, kubelet: FakeKubelet) -> None:
        self._api, self._kubelet = api, kubelet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)
        self.errors: list[BaseException] = []

    def __enter__(self) -> Nodes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        query = {"labelSelector": MANAGED, "fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}
        with ThreadPoolExecutor(4) as hands:
            while not self._stop.wait(0.1):
                pods = self._api.request("GET", self._api.endpoint("Pod").path(None), query=query)["items"]
                list(hands.map(self._play, pods))

    def _play(self, pod: Resource) -> None:
        try:
            self._kubelet._play({"kind": "Pod", **pod}, self._script, "node-a")
        except Exception as error:
            self.errors.append(error)

    def _script(self, pod: Resource) -> Exit | None:
        attempt = attempt_of(pod)
        assert attempt is not None
        name = pod["metadata"]["labels"]["finetune.dev/job"]
        if attempt.stage is Stage.TRAIN and name.startswith("running"):
            return None
        first = (attempt.stage, attempt.number) == (Stage.TRAIN, 1)
        if first and name.startswith("retried"):
            crash = Failure(
                failure_class=FailureClass.CRASH, rank=0, sentence="The loss is a ghost.", time=datetime.now(UTC)
            )
            return Exit(code=1, message=crash.model_dump_json(by_alias=True, exclude_none=True))
        return Trainer(self._api, pod["metadata"]["namespace"]).succeeds(pod)


@dataclass
class Script:
    """A plan that can be changed while the operator runs, and what it notices on the way."""

    api: Api
    plan: Plan = lambda call: None
    broken: list[str] = field(default_factory=list)

    def __call__(self, call: Call) -> Fault | None:
        if call.method == "POST" and call.resource == "pytorchjobs":
            self._nothing_else_trains(call)
        return self.plan(call)

    def _nothing_else_trains(self, call: Call) -> None:
        """The promise itself, asked of the API server in the moment before another attempt's PyTorchJob is made."""
        meta = call.body["metadata"]
        labels = {"finetune.dev/uid": meta["labels"]["finetune.dev/uid"], "finetune.dev/stage": "train"}
        for kind in ("PyTorchJob", "Pod"):
            for other in self.api.objects(kind, meta["namespace"], labels):
                number = other["metadata"]["labels"]["finetune.dev/attempt"]
                if number != meta["labels"]["finetune.dev/attempt"]:
                    self.broken.append(f"{meta['name']} is made while {kind} {other['metadata']['name']} is there")


def kill_at(count: int, acted: bool, matches: Callable[[Call], bool]) -> Plan:
    """Kill at the count-th request (from now) that matches."""
    numbers = itertools.count(1)
    lock = threading.Lock()

    def plan(call: Call) -> Fault | None:
        if not matches(call):
            return None
        with lock:
            return Kill(acted) if next(numbers) == count else None

    return plan


def changes_the_job(call: Call) -> bool:
    """All that changes anything but the Lease."""
    return call.mutates and call.resource != "leases"


def anything(call: Call) -> bool:
    """Reads, watches and the Lease too."""
    return True


def small_job(name: str, **spec: object) -> Resource:
    """A job of one training pod that publishes."""
    return fine_tune_job(name, topology={"nodes": 1, "gpusPerNode": 1}, **spec)


class Place:
    """A namespace in which one operator after the other carries one job after the other."""

    def __init__(self, arena: Arena, namespace: str) -> None:
        self.arena, self.namespace, self.api = arena, namespace, arena.control_plane.api
        furnish(self.api, namespace)
        self._life: Life | None = None
        self._script = Script(self.api)

    def life(self, plan: Plan | None = None, *, fresh: bool = False, **options: object) -> Life:
        """The operator that serves, or another one, with that plan from now on."""
        if self._life is not None and (fresh or not self._life.alive):
            self._life.end()
            self._life = None
        self._script.plan = plan or (lambda call: None)
        if self._life is None:
            self._life = self.arena.nursery.start(self.namespace, self._script, **options)  # type: ignore[arg-type]
        return self._life

    def carry(
        self, name: str, plan: Plan, *, fresh: bool = False, to_the_last_word: bool = False, **options: object
    ) -> JobOutcome:
        """Have a job carried to its end under a plan; if the operator is killed, by another one without a plan.

        The Event of the end follows its status: `to_the_last_word` waits for it.
        """
        life = self.life(plan, fresh=fresh, **options)
        begin = len(life.proxy.history)
        job = self.api.create(small_job(name), self.namespace)
        wait_until(lambda: life.proxy.killed.is_set() or self._ended(name), f"{name} to end", ENDS_WITHIN_SECONDS)
        if to_the_last_word:
            wait_until(lambda: "Complete" in told(name, life.proxy.history[begin:]), f"{name} to be told complete")
        history, killed = life.proxy.history[begin:], life.proxy.killed.is_set()
        if killed:
            life = self.life(fresh=True)
            wait_until(lambda: self._ended(name), f"{name} to end after a kill", ENDS_WITHIN_SECONDS)
            history += life.proxy.history
        status = self.api.get("FineTuneJob", name, self.namespace)["status"]
        broken, self._script.broken = self._script.broken, []
        self._script.plan = lambda call: None
        self.api.delete(job)
        return JobOutcome(name, status, history, killed, broken)

    def finished(self, names: list[str], status: Resource) -> None:
        """Jobs that ended long ago, with the status of one that did."""

        def make(name: str) -> None:
            job = self.api.create(small_job(name), self.namespace)
            self.api.patch(job, {"status": status}, "status")

        with ThreadPoolExecutor(4) as hands:
            list(hands.map(make, names))

    def running(self, names: list[str]) -> None:
        """Have jobs brought to Training, where they stay; nobody serves them then."""
        life = self.life()
        for name in names:
            self.api.create(small_job(name), self.namespace)
        wait_until(lambda: all(self.phase(name) == "Training" for name in names), "all to train", 120)
        wait_until(lambda: self._is_quiet(life), "the operator to be done")
        life.end()

    def phase(self, name: str) -> str:
        """The phase of a job; empty before its first status."""
        return str(self.status(name).get("phase", ""))

    def status(self, name: str) -> Resource:
        """The status of a job as it is now."""
        return self.api.get("FineTuneJob", name, self.namespace).get("status") or {}

    def _is_quiet(self, life: Life) -> bool:
        before = len(life.proxy.history)
        time.sleep(2)
        return not any(done.call.mutates and changes_the_job(done.call) for done in life.proxy.history[before:])

    def _ended(self, name: str) -> bool:
        return any(is_true(kind)(self.status(name)) for kind in ("Complete", "Failed"))


@dataclass
class JobOutcome:
    """How one job was carried."""

    name: str
    status: Resource
    history: list[Done]
    killed: bool
    broken: list[str]

    @property
    def writes(self) -> list[Done]:
        """What changed anything, but for the Lease."""
        changes = [done for done in self.history if changes_the_job(done.call)]
        # The last Events of the job before may come when this one has begun.
        return [d for d in changes if d.call.resource != "events" or d.call.body["regarding"]["name"] == self.name]

    def made(self, resource: str, stage: str) -> int:
        """How many objects the server made for a stage."""
        return sum(
            done.call.method == "POST"
            and done.code == 201
            and done.call.resource == resource
            and done.call.body["metadata"]["labels"]["finetune.dev/stage"] == stage
            for done in self.history
        )

    def complaints(self, other: JobOutcome | None = None) -> list[str]:
        """What is wrong with it, compared with an undisturbed one."""
        wanted = RETRIED if self.name.startswith("retried") else HAPPY
        attempts = [(a["stage"], a["number"], a["outcome"]) for a in self.status["attempts"]]
        found = list(self.broken)
        if attempts != wanted:
            found.append(f"attempts {attempts}")
        for (resource, stage), count in {("jobs", "publish"): 1, ("pytorchjobs", "train"): len(wanted) - 3}.items():
            if (made := self.made(resource, stage)) != count:
                found.append(f"{made} {resource} made for {stage}")
        if not is_true("Complete")(self.status):
            found.append(f"conditions {self.status['conditions']}")
        if other is not None:
            found += differences(settled(self.status), settled(other.status))
        return found


def told(name: str, history: list[Done]) -> list[str]:
    """Reasons of the Events of a job, in order."""
    events = [done.call.body for done in history if done.call.resource == "events" and done.code == 201]
    return [event["reason"] for event in events if event["regarding"]["name"] == name]


def differences(mine: object, theirs: object, where: str = "status") -> list[str]:
    """Where two statuses differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        names = {**mine, **theirs}
        return [d for name in names for d in differences(mine.get(name), theirs.get(name), f"{where}.{name}")]
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return [d for i, pair in enumerate(zip(mine, theirs, strict=True)) for d in differences(*pair, f"{where}.{i}")]
    return [] if mine == theirs else [f"{where}: {mine!r}, not {theirs!r}"]


def settled(value: object) -> object:
    """A status without what differs from run to run: moments, durations, and the transient `exited`."""
    if isinstance(value, dict):
        return {name: settled(item) for name, item in value.items() if name not in MEASURED and not is_moment(item)}
    return [settled(item) for item in value] if isinstance(value, list) else value


def is_moment(value: object) -> bool:
    """Whether it is a time."""
    return isinstance(value, str) and MOMENT.fullmatch(value) is not None


@dataclass
class Arena:
    """What all tests here share."""

    control_plane: ControlPlane
    nursery: Nursery
    places: queue.Queue[Place] = field(default_factory=queue.Queue)

    def each(self, tasks: list[Task]) -> list[JobOutcome]:
        """Tell stories in all places at a time."""

        def one(task: Task) -> JobOutcome:
            place = self.places.get()
            try:
                return task[1](place, task[0])
            finally:
                self.places.put(place)

        with ThreadPoolExecutor(NAMESPACES) as hands:
            return list(hands.map(one, tasks))


@pytest.fixture(scope="module")
def arena(control_plane: ControlPlane) -> Iterator[Arena]:
    """Namespaces, nodes, and the chart's rights."""
    try:
        binaries.ensure("helm")
    except binaries.BinaryUnavailableError as problem:
        pytest.skip(str(problem))
    control_plane.install_crds(definition())
    kubelet = FakeKubelet(control_plane.api)
    kubelet.add_node("node-a")
    with Nursery(control_plane) as nursery, Nodes(control_plane.api, kubelet) as nodes:
        made = Arena(control_plane, nursery)
        namespaces = [control_plane.create_namespace("killed") for _ in range(NAMESPACES)]
        for namespace in namespaces:
            made.places.put(Place(made, namespace))
        yield made
        assert not nodes.errors
    for namespace in namespaces:
        control_plane.delete_namespace(namespace)


def undisturbed(arena: Arena, name: str) -> JobOutcome:
    """A job to compare with."""
    (outcome,) = arena.each([(name, lambda place, name: place.carry(name, lambda call: None, to_the_last_word=True))])
    assert outcome.complaints() == []
    return outcome


Task = tuple[str, Callable[[Place, str], JobOutcome]]


def killed(name: str, count: int, acted: bool, matches: Callable[[Call], bool]) -> Task:
    """The task of a job whose operator is killed at its count-th request."""
    return name, lambda place, name: place.carry(name, kill_at(count, acted, matches))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["happy", "retried"])
def test_a_fresh_operator_goes_on_wherever_the_last_one_was_killed(arena: Arena, kind: str) -> None:
    pattern = undisturbed(arena, f"{kind}-pattern")
    stories = arena.each(
        [
            killed(f"{kind}-{count}-{'acted' if acted else 'unheard'}", count, acted, changes_the_job)
            for count in range(1, len(pattern.writes) + 1)
            for acted in (False, True)
        ]
    )
    assert {s.name: found for s in stories if (found := s.complaints(pattern))} == {}
    # A run may need a write less, when two things are seen at once: then the last kills have nothing to hit.
    assert sum(outcome.killed for outcome in stories) >= 0.9 * len(stories)


def test_reads_and_the_lease_are_no_better_places_to_be_killed_at(arena: Arena) -> None:
    pattern = undisturbed(arena, "happy-unkilled")
    counts = range(1, len(pattern.history), 7)
    stories = arena.each([killed(f"happy-any-{count}", count, True, anything) for count in counts])
    assert {s.name: found for s in stories if (found := s.complaints(pattern))} == {}
    assert any(outcome.killed for outcome in stories)


def test_a_job_costs_at_most_forty_two_writes_its_events_and_report_channels_counted(arena: Arena) -> None:
    outcome = undisturbed(arena, "happy-counted")
    counted = Counter((done.call.method, done.call.resource) for done in outcome.writes)
    assert counted.total() <= 42, counted
    channels = [counted["POST", resource] for resource in ("serviceaccounts", "roles", "rolebindings")]
    assert channels == [4, 4, 4], counted
    assert told(outcome.name, outcome.history) == TOLD


class Once:
    """The same fault for every different request that changes anything, when it comes for the first time.

    A status is written many times: every other write of it fails.
    """

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> Fault | None:
        if not changes_the_job(call):
            return None
        with self._lock:
            key = (call.method, call.path, call.name)
            self._seen[key] += 1
            odd = self._seen[key] % 2 == 1
            return self._fault if odd and (call.method == "PUT" or self._seen[key] == 1) else None


def always(fault: Fault) -> Plan:
    """A fault of every request but the Lease's."""
    return lambda call: None if call.resource == "leases" else fault


def watches_end(fault: EndWatch) -> Plan:
    """Every watch ends after some events, again and again."""
    return lambda call: fault if call.watches else None


FAULTS: dict[str, Plan] = {
    "conflict": Once(Refuse(409)),
    "too-many-requests": Once(Refuse(429, retry_after=1)),
    "internal-error": Once(Refuse(500)),
    "internal-error-acted": Once(Refuse(500, acted=True)),
    "unavailable": Once(Refuse(503)),
    "timeout-acted": Once(Refuse(504, acted=True)),
    "lost-unheard": Once(Lose(acted=False)),
    "lost-acted": Once(Lose(acted=True)),
    "silent-acted": Once(Lose(acted=True, silent=True)),
    "slow": always(Delay(0.3)),
    "watch-gone": watches_end(EndWatch(after=2, gone=True)),
    "watch-cut": watches_end(EndWatch(after=2)),
}


@pytest.mark.timeout(600)
def test_an_api_server_that_fails_in_any_way_is_survived(arena: Arena) -> None:
    pattern = undisturbed(arena, "retried-unfailed")

    def survives(fault: str) -> Task:
        name = f"retried-{fault}"
        # Only where no answer comes is the client to give up soon: on a busy machine answers take their time.
        tuned = {"REQUEST_TIMEOUT_SECONDS": 1.0 if fault == "silent-acted" else 30.0}
        return name, lambda place, name: place.carry(name, FAULTS[fault], fresh=True, tuned=tuned)

    stories = arena.each([survives(fault) for fault in FAULTS])
    assert {s.name: found for s in stories if (found := s.complaints(pattern))} == {}


def test_a_restart_writes_nothing_about_jobs_whose_state_did_not_change(arena: Arena) -> None:
    pattern = undisturbed(arena, "happy-finished")
    place = arena.places.get()
    try:
        finished = [f"finished-{number}" for number in range(100)]
        running = [f"running-{number}" for number in range(20)]
        place.finished([*finished, "zz-last"], pattern.status)
        place.running(running)
        # Jobs that had ended are looked at last and in their order: once this one's retry is seen, all have been.
        last = place.api.get("FineTuneJob", "zz-last", place.namespace)
        place.api.patch(last, {"metadata": {"annotations": {"finetune.dev/retry": "again"}}})
        # How long they have run is written once a minute; on a busy machine it may be time for that.
        life = place.life(fresh=True, tuned={"WRITE_INTERVAL_SECONDS": 3600.0})
        place.api.create(small_job("latest", suspend=True), place.namespace)
        wait_until(lambda: "Suspended" in place.phase("latest"), "the latest job to be seen", 60)
        wait_until(lambda: place.status("zz-last").get("observedRetry") == "again", "all others to be seen", 60)
        written = [done.call.name for done in life.proxy.history if changes_the_job(done.call)]
        assert [name for name in written if not name.startswith(("latest", "zz-last"))] == []
        assert {place.phase(name) for name in finished} == {"Complete"}
        assert {place.phase(name) for name in running} == {"Training"}
    finally:
        arena.places.put(place)
