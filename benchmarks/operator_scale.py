"""The operator with very many jobs on a real API server: `python -m benchmarks.operator_scale --jobs 1000`.

There are no controllers: this program is kubelet, Job controller and training-operator, so that what is measured is
the operator and the API server. Every job goes through all four stages. First all jobs are created at once, then
others at a steady rate. Latency is the time from before the request that ends a stage's child is sent (so that the
API server's own time is in it) until the job's status that says so has come back over a watch, for every stage of
every job. Results go to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import kubernetes
from tests.integration.harness import binaries
from tests.integration.harness.api import ApiError
from tests.integration.harness.control_plane import ControlPlane
from tests.integration.harness.helm import Helm
from tests.integration.harness.operator import ACCOUNT, attempt_of, fine_tune_job, furnish
from tests.integration.harness.processes import wait_until
from tests.integration.harness.programs import Programs
from tests.unit.finetune_operator.decision.world import job as world

from finetune_api.base import Stage
from finetune_api.crd import definition
from finetune_api.report import Report
from finetune_api.runconfig import Attempt

Object = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
NAMESPACE = "scale"
MERGE = {"Content-Type": "application/merge-patch+json"}
KINDS = {"Job": "/apis/batch/v1", "PyTorchJob": "/apis/kubeflow.org/v1", "FineTuneJob": "/apis/finetune.dev/v1alpha1"}


class BareControlPlane(ControlPlane):
    """etcd and kube-apiserver alone."""

    def start(self) -> None:
        """Start both, and install the two CRDs and the operator's rights."""
        self._programs = Programs(self.folder)
        self._programs.start_api_server()
        self._programs.wait_for_api_server(self.api)
        manifests = binaries.ensure_training_operator_manifests()
        for source in (manifests / "crds" / "kubeflow.org_pytorchjobs.yaml", definition()):
            for applied in self.apply(source):
                self._wait_until_established(applied)
        for kind in KINDS:
            wait_until(lambda kind=kind: self._serves(kind), f"{kind} to be served")
        for name in ("ops", NAMESPACE):
            self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def pids(self) -> dict[str, int]:
        """Process ids of both."""
        both = {"etcd": self._programs._etcd.pid, "apiserver": self._programs._api_server.pid}
        return {name: pid for name, pid in both.items() if pid is not None}

    def _serves(self, kind: str) -> bool:
        try:
            self.api.request("GET", f"{KINDS[kind]}/{kind.lower()}s")
        except ApiError:
            return False
        return True


class Operator:
    """`finetune operator`, and what the kernel says of it."""

    serial = itertools.count(1)

    def __init__(self, kubeconfig: Path, folder: Path, profile: str = "") -> None:
        environment = {
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_NAMESPACES": NAMESPACE,
            # A Lease of its own name: it need not wait for the end of the one before.
            "FINETUNE_LEASE_NAME": f"scale-{next(self.serial)}",
            "FINETUNE_LEASE_NAMESPACE": "ops",
            "FINETUNE_HEALTH_PORT": "0",
            "FINETUNE_METRICS_PORT": "0",
        }
        self.log = folder / "operator.log"
        command = [sys.executable, Path(sys.executable).parent / "finetune", "operator"]
        if profile:
            command[1:1] = ["-m", "cProfile", "-o", profile]
        self._begun = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._begun

    def peak_megabytes(self) -> float:
        """The most memory that it had, in 10⁶ bytes."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(timeout=30)


class Clock:
    """Seconds on the wall and on the processors, by process, since it was made."""

    def __init__(self, operator: Operator, control_plane: BareControlPlane) -> None:
        self._pids = {"operator": operator.pid, "bench": os.getpid(), **control_plane.pids()}
        self._begun = time.monotonic()
        self._before = {name: cpu_seconds(pid) for name, pid in self._pids.items()}

    @property
    def seconds(self) -> float:
        """Time on the wall."""
        return time.monotonic() - self._begun

    def cpu(self) -> dict[str, float]:
        """Processor time of each process."""
        return {name: round(cpu_seconds(pid) - self._before[name], 2) for name, pid in self._pids.items()}


def cpu_seconds(pid: int) -> float:
    """Processor time of a process since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Cluster:
    """Kubelet, controllers and trainer of one namespace, and a stop-watch."""

    session: aiohttp.ClientSession
    server: str
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(16))
    ended: dict[tuple[str, str], float] = field(default_factory=dict)
    """When a job's stage was written as Complete, by job and stage."""
    latencies: list[float] = field(default_factory=list)
    complete: set[str] = field(default_factory=set)
    reports: dict[Stage, Object] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def watch(self, kind: str) -> None:
        """Follow a kind for ever."""
        wanted = (b'{"type":"ADDED"', b'{"type":"MODIFIED"') if kind == "FineTuneJob" else (b'{"type":"ADDED"',)
        async for body in self._events(kind, wanted):
            if kind == "FineTuneJob":
                self._note(body)
                continue
            task = asyncio.create_task(self._carry(kind, body))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if error := task.exception():
            print(f"bench: {error!r}", file=sys.stderr)

    def _note(self, body: Object) -> None:
        name, status = body["metadata"]["name"], body.get("status") or {}
        for record in status.get("attempts", []):
            ended = self.ended.get((name, record["stage"]))
            if record["outcome"] == "succeeded" and ended is not None:
                del self.ended[name, record["stage"]]
                self.latencies.append(time.monotonic() - ended)
        if status.get("phase") == "Complete":
            self.complete.add(name)

    async def _carry(self, kind: str, body: Object) -> None:
        """A child of the operator, from its pod to its end."""
        meta, spec = body["metadata"], body["spec"]
        template = spec["template"] if kind == "Job" else spec["pytorchReplicaSpecs"]["Worker"]["template"]
        pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
        name = f"{meta['name']}-0"
        owner = {"apiVersion": body["apiVersion"], "kind": kind, "name": meta["name"], "uid": meta["uid"]}
        labels = template["metadata"]["labels"]
        pod = {"metadata": {"name": name, "labels": labels, "ownerReferences": [owner | {"controller": True}]}}
        attempt = attempt_of({"spec": template["spec"]})
        assert attempt is not None
        async with self.slots:
            await self.ask("POST", pods, pod | {"spec": template["spec"]})
            await self.ask("PATCH", f"{pods}/{name}/status", {"status": pod_status(template["spec"], "Running")})
            await self._report(labels["finetune.dev/job"], attempt)
            await self.ask("PATCH", f"{pods}/{name}/status", {"status": pod_status(template["spec"], "Succeeded")})
            self.ended[labels["finetune.dev/job"], attempt.stage] = time.monotonic()
            path = f"{KINDS[kind]}/namespaces/{NAMESPACE}/{kind.lower()}s/{meta['name']}/status"
            await self.ask("PATCH", path, {"status": succeeded(kind)})

    async def _report(self, job: str, attempt: Attempt) -> None:
        if attempt.stage not in self.reports:
            fields = {"attempt": attempt.id, "stage": attempt.stage, "time": datetime.now(UTC), "done": True}
            report = Report.model_validate(fields | world().product(attempt.stage))
            self.reports[attempt.stage] = report.to_wire()
        name = f"{job}-{attempt.stage}-report"
        data = {str(attempt.stage): json.dumps(self.reports[attempt.stage] | {"attempt": attempt.id, "time": now()})}
        await self.ask("PATCH", f"/api/v1/namespaces/{NAMESPACE}/configmaps/{name}", {"data": data})

    async def ask(self, method: str, path: str, body: Object) -> Object:
        """One request."""
        headers = MERGE if method == "PATCH" else {}
        async with self.session.request(method, self.server + path, json=body, headers=headers) as answer:
            found: Object = await answer.json()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {found.get('message')}")
            return found

    async def _events(self, kind: str, wanted: tuple[bytes, ...]) -> AsyncIterator[Object]:
        """Bodies of the events that begin as wanted; the others are not even read."""
        place = f"{self.server}{KINDS[kind]}/namespaces/{NAMESPACE}/{kind.lower()}s"
        async with self.session.get(f"{place}?limit=1") as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        async with self.session.get(f"{place}?watch=true&timeoutSeconds=3600&resourceVersion={version}") as answer:
            async for line in answer.content:
                if line.startswith(wanted):
                    yield json.loads(line)["object"]
                elif line.startswith(b'{"type":"ERROR"'):
                    raise RuntimeError(f"The watch of {kind} said: {line.decode()}")


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def pod_status(spec: Object, phase: str) -> Object:
    """The status of a pod that runs or has succeeded."""
    running = {"running": {"startedAt": now()}}
    ended = {"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": now(), "finishedAt": now()}}
    container = {
        "name": spec["containers"][0]["name"],
        "image": spec["containers"][0]["image"],
        "imageID": "",
        "ready": phase == "Running",
        "restartCount": 0,
        "state": running if phase == "Running" else ended,
    }
    return {"phase": phase, "startTime": now(), "containerStatuses": [container]}


def succeeded(kind: str) -> Object:
    """The status of a child that has succeeded."""
    moment = now()
    if kind == "PyTorchJob":
        worker = {"Worker": {"succeeded": 1}}
        return {
            "conditions": [{"type": "Succeeded", "status": "True", "lastTransitionTime": moment}],
            "replicaStatuses": worker,
        }
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": moment} for kind in ("SuccessCriteriaMet", "Complete")
    ]
    return {"conditions": conditions, "startTime": moment, "completionTime": moment, "succeeded": 1}


def small_job(name: str) -> Object:
    """A job of one pod per stage."""
    return fine_tune_job(name, topology={"nodes": 1, "gpusPerNode": 1})


@contextlib.asynccontextmanager
async def connected(control_plane: ControlPlane) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with the rights of the admin."""
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config(str(control_plane.kubeconfig), client_configuration=configuration)
    tls = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    tls.load_cert_chain(configuration.cert_file, configuration.key_file)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(ssl=tls, limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**24) as session:
        yield session


async def carry(control_plane: ControlPlane, names: list[str], rate: float) -> Cluster:
    """Create jobs, `rate` per second, or all at once (0), and play until all are Complete."""
    path = f"{KINDS['FineTuneJob']}/namespaces/{NAMESPACE}/finetunejobs"
    async with connected(control_plane) as session:
        cluster = Cluster(session, control_plane.server)
        watches = [asyncio.create_task(cluster.watch(kind)) for kind in KINDS]
        begun = shown = time.monotonic()

        async def create(number: int, name: str) -> None:
            if rate:
                await asyncio.sleep(begun + number / rate - time.monotonic())
            async with cluster.slots:
                await cluster.ask("POST", path, small_job(name))

        await asyncio.gather(*(create(number, name) for number, name in enumerate(names)))
        while len(cluster.complete) < len(names):
            for watch in watches:
                if watch.done():
                    watch.result()
                    raise RuntimeError("A watch of the bench ended.")
            await asyncio.sleep(0.1)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"{shown - begun:5.0f} s: {len(cluster.complete)} of {len(names)} Complete", file=sys.stderr)
        for watch in watches:
            watch.cancel()
        return cluster


def carried(control_plane: BareControlPlane, operator: Operator, names: list[str], rate: float = 0.0) -> Object:
    """Have jobs carried to Complete; how long it took, whom, and how late the statuses were."""
    clock = Clock(operator, control_plane)
    cluster = asyncio.run(carry(control_plane, names, rate))
    cuts = statistics.quantiles(cluster.latencies, n=100)
    return {
        "jobs": len(names),
        "jobsPerSecond": rate or "all at once",
        "secondsToAllComplete": round(clock.seconds, 1),
        "cpuSeconds": clock.cpu(),
        "childToStatusSeconds": {
            "p50": round(cuts[49], 3),
            "p99": round(cuts[98], 3),
            "max": round(max(cluster.latencies), 3),
            "count": len(cluster.latencies),
        },
        "peakMegabytes": round(operator.peak_megabytes(), 1),
    }


def writes_by_kind(control_plane: ControlPlane, user: str) -> Counter[str]:
    """What the operator wrote, from the API server's audit log; its Lease left out."""
    verbs = ("create", "update", "patch", "delete")
    events = (event for event in control_plane.audit_events(user) if event["verb"] in verbs)
    return Counter(
        f"{event['verb']} {event['objectRef']['resource']}"
        for event in events
        if event["objectRef"]["resource"] != "leases"
    )


async def add_finished(control_plane: ControlPlane, count: int) -> None:
    """Create jobs that ended long ago; their children were cleaned up."""
    status = control_plane.api.get("FineTuneJob", "job-00000", NAMESPACE)["status"]
    path = f"{KINDS['FineTuneJob']}/namespaces/{NAMESPACE}/finetunejobs"
    async with connected(control_plane) as session:
        cluster = Cluster(session, control_plane.server)

        async def make(name: str) -> None:
            async with cluster.slots:
                await cluster.ask("POST", path, small_job(name))
                await cluster.ask("PATCH", f"{path}/{name}/status", {"status": status})

        await asyncio.gather(*(make(f"old-{number:05}") for number in range(count)))


def started(control_plane: BareControlPlane, operator: Operator) -> float:
    """Seconds from the start of an operator until a job that was new to it has its first status."""
    name = f"fresh-{time.monotonic_ns()}"
    control_plane.api.create(small_job(name) | {"spec": small_job(name)["spec"] | {"suspend": True}}, NAMESPACE)
    wait_until(lambda: control_plane.api.get("FineTuneJob", name, NAMESPACE).get("status"), "the first status", 300)
    return operator.age


def rested(operator: Operator, seconds: float) -> Object:
    """What an operator uses when nothing happens: after it has come to rest."""
    before = -1.0
    while (used := cpu_seconds(operator.pid)) - before > 0.1:
        before = used
        time.sleep(1)
    caught_up = operator.age
    time.sleep(seconds)
    return {
        "atRestAfterSeconds": round(caught_up, 1),
        "cpuSecondsUntilThen": round(used, 1),
        "idleCpu": round((cpu_seconds(operator.pid) - used) / seconds, 4),
        "peakMegabytes": round(operator.peak_megabytes(), 1),
    }


def start_up(control_plane: BareControlPlane, operator: Operator, idle_seconds: float) -> Object:
    """What a start costs an operator that was just started."""
    return {"startUpSeconds": round(started(control_plane, operator), 1)} | rested(operator, idle_seconds)


def say(figures: Object) -> Object:
    """Show figures as soon as they are there; returns them."""
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def measure(given: argparse.Namespace) -> Object:
    """Run everything; the figures."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-scale-"))
    control_plane = BareControlPlane.own()
    with control_plane:
        Helm(folder, control_plane.kubeconfig).install(
            "ops", {"namespaces": [], "crd": {"install": False}, "rbac": {"aggregate": False}}
        )
        control_plane.apply(any_lease(), "ops")
        furnish(control_plane.api, NAMESPACE)
        kubeconfig = control_plane.kubeconfig_for(ACCOUNT, "ops")
        result: Object = {
            "date": now(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "loadBefore": os.getloadavg(),
        }
        operator = Operator(kubeconfig, folder, given.profile)
        wait_until(lambda: "holds the Lease" in operator.log.read_text(), "the operator to lead", 60)
        names = [f"job-{number:05}" for number in range(given.jobs)]
        result["atOnce"] = say(carried(control_plane, operator, names)) | say(rested(operator, given.idle_seconds))
        operator.stop()
        writes = writes_by_kind(control_plane, f"system:serviceaccount:ops:{ACCOUNT}")
        result["writesPerJob"] = writes.total() / given.jobs
        result["writes"] = dict(writes.most_common())
        operator = Operator(kubeconfig, folder)
        result[f"startWith{given.jobs}Finished"] = say(start_up(control_plane, operator, given.idle_seconds))
        if given.steady_jobs:
            names = [f"steady-{number:05}" for number in range(given.steady_jobs)]
            result["steady"] = say(carried(control_plane, operator, names, given.rate))
        operator.stop()
        if given.finished > given.jobs:
            asyncio.run(add_finished(control_plane, given.finished - given.jobs))
            operator = Operator(kubeconfig, folder)
            result[f"startWith{given.finished}Finished"] = start_up(control_plane, operator, given.idle_seconds)
            operator.stop()
    return result


def any_lease() -> list[Object]:
    """Rights to a Lease of any name."""
    rule = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "any-lease"}
    head = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "any-lease"}}
    subjects = [{"kind": "ServiceAccount", "name": ACCOUNT}]
    return [
        head | {"kind": "Role", "rules": [rule]},
        head | {"kind": "RoleBinding", "roleRef": role, "subjects": subjects},
    ]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--finished", type=int, default=10_000, help="finished jobs of the last restart; 0: none")
    parser.add_argument("--steady-jobs", type=int, default=240, help="jobs that are created at a steady rate; 0: none")
    parser.add_argument("--rate", type=float, default=4, help="of them, per second")
    parser.add_argument("--idle-seconds", type=float, default=20)
    parser.add_argument("--profile", default="", help="write cProfile's figures of the operator to this file")
    given = parser.parse_args()
    result = measure(given)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"operator-scale-{given.jobs}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
