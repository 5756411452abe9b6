"""A namespace with volumes, tokens and a Hub of its own, in which one test is the user of the product."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.integration.harness.api import Api, ApiError, Resource
from tests.integration.harness.processes import TimedOutError, wait_until
from tests.support.hub_server import HubServer, hub_environment
from tests.support.time_limits import scaled
from tests.support.tiny import MOODS, days, greetings

from finetune_api.base import Stage

from .clusters import JOB, Cluster


def table(rows: list[tuple[str, str]]) -> str:
    """Sentences and their labels as CSV."""
    return "\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]) + "\n"


DATASETS = {"days": {"days.csv": table(days(160))}, "greetings": {"greetings.jsonl": greetings(128)}}
"""The files of the datasets; a quarter of them, held out, is enough for the gate."""
TRAIN_SECONDS = 420
"""For three pods that import torch on two busy cores."""
LABEL_STAGE, LABEL_ATTEMPT, LABEL_UID = "finetune.dev/stage", "finetune.dev/attempt", "finetune.dev/uid"
READ_TOKEN, WRITE_TOKEN = "hf_reader", "hf_writer"
_SIGNAL_RANK = """
import os, pathlib, sys
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        words = (process / "cmdline").read_bytes().split(b"\\0")
    except OSError:
        continue
    if words[-2:] == [b"train", b""] and b"launch" not in words:
        os.kill(int(process.name), int(sys.argv[1]))
        sys.exit()
sys.exit("no rank is running")
"""
"""Run in a training pod: the rank is the child of its first process, the launcher."""


DAYS = {"name": "days", "repo": "acme/days", "task": "classification", "template": "{{ text }}"}
GREETINGS = {"name": "greetings", "repo": "acme/greetings", "task": "chat"}
TRAINING = {
    "epochs": 3,
    "learningRate": 5.0e-3,
    "globalBatchSize": 12,
    "maxSequenceLength": 128,
    "precision": "fp32",
}


AFTER_EVERY_STEP = {"everyMinutes": 0}
"""Checkpoints: what happens at a step finds the one before saved, and steps last long enough for it to happen."""


def job_spec(**changes: Any) -> Resource:
    """Three nodes learn with LoRA which words make a day good, and what is said of it: two tasks together."""
    spec: Resource = {
        "model": {"repo": "acme/base"},
        "datasets": [DAYS, GREETINGS],
        "split": {"validation": 0, "test": 0.25, "seed": 42},
        "tuning": {"method": "lora", "lora": {"rank": 16, "alpha": 32}},
        "training": dict(TRAINING),
        "topology": {"nodes": 3, "gpusPerNode": 0},
        "checkpoint": {"everyMinutes": 10},
        "publish": {"repo": "acme/days-tuned"},
        "evaluation": {"maxNewTokens": 16},
        "credentials": {"hub": {"name": "hf-read"}, "publish": {"name": "hf-write"}},
        "timeouts": {"startup": "5m"},
    }
    for path, value in changes.items():
        target = spec
        *parents, last = path.split("__")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return spec


@dataclass
class Tenant:
    """What a test has: a namespace, and everything that a user of it would ask for."""

    api: Api
    cluster: Cluster
    namespace: str
    hub: HubServer
    timeline: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    # -- what a user does ---------------------------------------------------------------------------------------

    def furnish(self, base: Path) -> None:
        """Volumes, tokens, a model and two datasets."""
        self.cluster.furnish(self.namespace)
        self.create("Secret", "hf-read", stringData={"token": READ_TOKEN})
        self.create("Secret", "hf-write", stringData={"token": WRITE_TOKEN})
        self.hub.add_token(READ_TOKEN, user="reader")
        self.hub.add_token(WRITE_TOKEN, user="acme", write=True)
        self.hub.add_repo("acme/base", base)
        for name, files in DATASETS.items():
            self.hub.add_repo(f"acme/{name}", dict(files), kind="datasets")

    def create(self, kind: str, name: str, **fields: Any) -> Resource:
        """Create an object in the namespace."""
        api_version = self.api.endpoint(kind).api_version
        made = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}, **fields}
        return self.api.create(made, self.namespace)

    def apply(self, more: Mapping[str, str] | None = None, **changes: Any) -> Resource:
        """`kubectl apply` of the job: parts of the spec may be replaced (`training__epochs=1`), variables added."""
        made = job_spec(**{"storage": {"run": self.cluster.storage}} | changes)
        spec = {name: value for name, value in made.items() if value is not None}
        environment = hub_environment(self.hub, Path("/tmp/hf"))
        variables = ({"OMP_NUM_THREADS": "1"} | environment | (more or {})).items()
        spec.setdefault("podTemplate", {})["env"] = [{"name": name, "value": value} for name, value in variables]
        job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": JOB}, "spec": spec}
        self.kubectl("apply", "-f", "-", given=json.dumps(job))
        return self.job()

    def kubectl(self, *words: str, given: str | None = None, seconds: float = 60) -> str:
        """Run kubectl as the user; raises AssertionError with what it said."""
        return self.cluster.kubectl(self.namespace, *words, given=given, seconds=seconds)

    def patch(self, body: Resource) -> None:
        """Change the job."""
        self.api.patch({"kind": "FineTuneJob", "metadata": {"name": JOB, "namespace": self.namespace}}, body)

    # -- what is seen -------------------------------------------------------------------------------------------

    def job(self) -> Resource:
        """The resource as it is."""
        return self.api.get("FineTuneJob", JOB, self.namespace)

    def status(self) -> Resource:
        """Its status; empty before the operator has seen it."""
        return self.job().get("status") or {}

    def wait(self, condition: Callable[[Resource], Any], what: str, seconds: float = TRAIN_SECONDS) -> Resource:
        """Wait until the status is as wanted, and return it. A job that failed meanwhile ends the wait."""

        def seen() -> Resource | None:
            status = self.status()
            if condition(status):
                return status
            failed = condition_of(status, "Failed")
            assert failed.get("status") != "True", f"waiting for {what}: {failed.get('message')}"
            return None

        return wait_until(seen, what, seconds)

    def complete(self, seconds: float = 2 * TRAIN_SECONDS) -> Resource:
        """Wait as a user does until the job is complete, and return its status."""
        wait = ["wait", "--for=condition=Complete", f"--timeout={scaled(seconds):.0f}s", f"finetunejob/{JOB}"]
        try:
            self.kubectl(*wait, seconds=seconds + 30)
        except AssertionError as problem:
            kind = TimedOutError if "timed out waiting" in str(problem) else AssertionError
            raise kind(f"{problem}: {condition_of(self.status(), 'Ready').get('message')}") from problem
        return self.status()

    def failed(self, seconds: float = TRAIN_SECONDS) -> Resource:
        """Wait until the job has failed, and return its status."""

        def ended() -> Resource | None:
            status = self.status()
            assert not is_true(status, "Complete"), condition_of(status, "Complete")["message"]
            return status if is_true(status, "Failed") else None

        return wait_until(ended, "Failed", seconds)

    def trained_to(self, step: int, attempt: int = 1) -> None:
        """Wait until the ranks of an attempt have taken a step, as they note on the volume."""

        def taken(status: Resource) -> bool:
            return any(row["step"] >= step and row["attempt"] == attempt for row in self._steps())

        self.wait(taken, f"step {step} of attempt {attempt}")

    def attempt_is(self, outcome: str, number: int, stage: Stage = Stage.TRAIN) -> Callable[[Resource], bool]:
        """Whether an attempt is in that state, as a condition to wait for."""
        return lambda status: any(
            a["stage"] == stage and a["number"] == number and a.get("outcome", "running") == outcome
            for a in status.get("attempts", [])
        )

    def pods(self, stage: Stage = Stage.TRAIN, attempt: int | None = None) -> list[Resource]:
        """The pods of a stage, or of one attempt, in the order of their ranks."""
        labels = {LABEL_STAGE: str(stage)} | ({LABEL_ATTEMPT: str(attempt)} if attempt else {})
        return self.api.objects("Pod", self.namespace, labels)

    def signal(self, pod: Resource, number: int) -> None:
        """Send a signal to the rank of a training pod; raises AssertionError if none is running."""
        name = pod["metadata"]["name"]
        self.kubectl("exec", name, "--", "python", "-c", _SIGNAL_RANK, str(int(number)))

    @contextlib.contextmanager
    def held(self, pod: Resource) -> Iterator[None]:
        """Let a training pause, as long as something takes that is to happen during it."""
        self.signal(pod, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(AssertionError):  # it may have ended
                self.signal(pod, signal.SIGCONT)

    def ended(self, stage: Stage = Stage.TRAIN) -> list[tuple[str, bool]]:
        """How the attempts of a stage ended, and whether that counted."""
        attempts = [a for a in self.status().get("attempts", []) if a["stage"] == stage]
        return [(a.get("reason") or a.get("outcome", "running"), a.get("counted", False)) for a in attempts]

    @property
    def run(self) -> str:
        """The run directory of the present job, on the volume."""
        return f"{self.namespace}/{JOB}/{self.job()['metadata']['uid']}"

    def read(self, path: str) -> str:
        """A file of the run directory; empty where there is none."""
        return self.cluster.read(self.namespace, f"{self.run}/{path}")

    def files(self, folder: str, run: str | None = None) -> list[str]:
        """The names in a folder of a run directory."""
        return self.cluster.files(self.namespace, f"{run or self.run}/{folder}")

    def losses(self) -> dict[int, float]:
        """The loss of each step, as the last attempt that took it saw it."""
        return {row["step"]: row["loss"] for row in self._steps()}

    def _steps(self) -> list[dict[str, Any]]:
        lines = self.read("metrics/train.jsonl").splitlines(keepends=True)
        return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if "loss" in row]

    # -- what is kept -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note every change of the status and of the pods, with its time, in the background."""
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._stop.set()
            watcher.join(10)

    def _watch(self) -> None:
        begun, before = time.monotonic(), ""
        while not self._stop.wait(0.5):
            with contextlib.suppress(ApiError):
                now = self._glance()
                if now != before:
                    self.timeline.append(f"{time.monotonic() - begun:7.1f} s  {now}")
                    before = now

    def _glance(self) -> str:
        jobs = self.api.objects("FineTuneJob", self.namespace)
        status = (jobs[0].get("status") or {}) if jobs else {}
        ready = condition_of(status, "Ready")
        step = (status.get("progress") or {}).get("step", "")
        pods = [
            f"{pod['metadata']['name'].removeprefix(f'{JOB}-')}={pod['status'].get('phase')}"
            + ("-" if "deletionTimestamp" in pod["metadata"] else "")
            for pod in self.api.objects("Pod", self.namespace)
        ]
        return f"{status.get('phase', '')} {ready.get('reason', '')} step {step}: {' '.join(pods)}"

    def told(self) -> list[str]:
        """The timeline, and when each attempt had made its first step, by the volume's own notes."""
        first: dict[int, float] = {}
        with contextlib.suppress(ApiError, OSError, AssertionError):  # the job may be gone
            applied = datetime.fromisoformat(self.job()["metadata"]["creationTimestamp"]).timestamp()
            for row in self._steps():
                first.setdefault(row["attempt"], row["time"] - applied)
        steps = [f"{seconds:7.1f} s after it was applied: attempt {n}'s first step" for n, seconds in first.items()]
        return [*self.timeline, *steps]

    def keep_evidence(self, folder: Path) -> None:
        """Write logs of all pods, events, objects and the timeline into a folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "timeline.txt").write_text("\n".join(self.timeline) + "\n")
        for kind in ("FineTuneJob", "Pod", "PyTorchJob", "Job", "PersistentVolumeClaim"):
            (folder / f"{kind}.json").write_text(json.dumps(self.api.objects(kind, self.namespace), indent=1))
        events = self.api.request("GET", f"/api/v1/namespaces/{self.namespace}/events")["items"]
        events.sort(key=lambda e: e["metadata"]["creationTimestamp"])
        lines = [f"{e['lastTimestamp']} {e['involvedObject']['name']} {e['reason']}: {e['message']}" for e in events]
        (folder / "events.txt").write_text("\n".join(lines) + "\n")
        for pod in self.api.objects("Pod", self.namespace):
            self._keep_log(pod, folder)
        with contextlib.suppress(OSError, AssertionError):  # files come and go
            self.cluster.keep(self.namespace, folder / "run")

    def _keep_log(self, pod: Resource, folder: Path) -> None:
        for container in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
            with contextlib.suppress(ApiError):
                log = self.api.request("GET", self.api.path_of(pod, "log"), query={"container": container["name"]})
                name = f"{pod['metadata']['name']}-{container['name']}.log"
                (folder / name).write_text(str(log.get("message", log)))

    def clear(self) -> None:
        """Delete the namespace and its volumes."""
        self.api.delete({"kind": "Namespace", "metadata": {"name": self.namespace}})

        def gone() -> bool:
            pods = self.api.objects("Pod", self.namespace)
            for pod in pods:
                self.api.delete(pod, grace_seconds=0)
            return not pods

        wait_until(gone, "the pods to go", 120)
        self.cluster.forget(self.namespace)


def condition_of(status: Resource, kind: str) -> Resource:
    """A condition of a status; empty if it is not there."""
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


def is_true(status: Resource, kind: str) -> bool:
    """Whether a condition holds."""
    return bool(condition_of(status, kind).get("status") == "True")


def accuracy(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> float:
    """The share of sentences whose right label is likelier, end token included, than the wrong one."""
    import torch

    def score(sentence: str, label: str) -> float:
        chat = [{"role": "user", "content": sentence}, {"role": "assistant", "content": label}]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{label}<|im_end|>")]
        whole = torch.tensor([ids[0] + ids[1]])
        logits = model(input_ids=whole).logits[0, :-1].log_softmax(-1)
        return float(logits[torch.arange(whole.shape[1] - 1), whole[0, 1:]][-len(ids[1]) :].sum())

    with torch.no_grad():
        right = [max(MOODS, key=lambda label: score(text, label)) == gold for text, gold in rows]
    return sum(right) / len(right)
