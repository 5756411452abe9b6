"""A tenant that attacks, beside an honest one: with the spec of its job, and with code in its training pod."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.integration.harness.api import ApiError, Resource

from finetune_operator.manifests.job import RUN_VOLUME

from .clusters import JOB
from .tenant import AFTER_EVERY_STEP, DAYS, READ_TOKEN, WRITE_TOKEN, Tenant, condition_of, is_true

ENDLESS_LAYERS = "0-99999999999"
"""As many numbers as no memory holds, in one field of the spec."""
ENDLESS_PATTERN = r".*\.q_proj|([a-z_.0-9]+)+#"
"""Takes a backtracking engine longer with every character, up to years."""
_IN_THE_POD = """
import json, os, ssl, sys, time, urllib.error, urllib.request
given = json.loads(sys.argv[1])
secrets = "/var/run/secrets/finetune-report/"
context = ssl.create_default_context(cafile=secrets + "ca.crt")
codes = []
for name, body in given["patches"]:
    address = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    url = f"{address}/api/v1/namespaces/{given['namespace']}/configmaps/{name}"
    request = urllib.request.Request(url, json.dumps(body).encode(), method="PATCH")
    request.add_header("Content-Type", "application/merge-patch+json")
    request.add_header("Authorization", "Bearer " + open(secrets + "token").read())
    try:
        codes.append(urllib.request.urlopen(request, context=context).status)
    except urllib.error.HTTPError as error:
        codes.append(error.code)
print(json.dumps(codes), flush=True)
if given["links"] and os.fork() == 0:
    os.setsid()
    for number in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    while not os.path.exists(given["export"] + "/digest.json"):
        time.sleep(0.002)
    for path, target in given["links"]:
        os.makedirs(os.path.dirname(given["export"] + "/" + path), exist_ok=True)
        os.symlink(target, given["export"] + "/" + path)
"""
"""Patches ConfigMaps with the pod's own token; then waits for the export, and puts links into it."""


@dataclass
class Attack:
    """What was tried and what was seen; from `begin` on it goes on in the background."""

    tenant: Tenant
    refusal: str = ""
    """What the API server says of an endless field."""
    ignored: str = ""
    """What the job says while its report has a time without a zone."""
    pods_while_suspended: int = -1
    codes: dict[str, int] = field(default_factory=dict)
    """How the API server answers what the training pod asks for."""
    status: Resource = field(default_factory=dict)
    """In the end."""
    seen: str = ""
    """Everything that the tenant can read in the end, but for the Secrets."""
    _running: Future[None] | None = None

    def begin(self) -> None:
        """Start."""
        self._running = ThreadPoolExecutor(1).submit(self._run)

    def end(self) -> Attack:
        """Wait until all was tried; raises what went wrong with that."""
        assert self._running is not None
        self._running.result()
        return self

    def _run(self) -> None:
        tenant, small = self.tenant, {"topology": {"nodes": 1, "gpusPerNode": 0}, "datasets": [DAYS]}
        lora: dict[str, Any] = {"rank": 16, "alpha": 32}
        try:
            tenant.apply(**small, tuning={"method": "lora", "lora": lora | {"layers": ENDLESS_LAYERS}})
        except AssertionError as error:
            self.refusal = str(error)
        lora["targetModules"] = ENDLESS_PATTERN
        tuning = {"method": "lora", "lora": lora}
        tenant.apply(**small, tuning=tuning, checkpoint=AFTER_EVERY_STEP, retry={"limit": 0})
        tenant.trained_to(1)
        self._send_a_time_without_a_zone()
        tenant.patch({"spec": {"suspend": False}})
        tenant.wait(tenant.attempt_is("running", 2), "the second attempt")
        tenant.trained_to(1, attempt=2)
        self._forge_and_plant()
        self.status = tenant.failed()
        self.seen = self._everything()

    def _send_a_time_without_a_zone(self) -> None:
        """While the rank that would write the next report stands still; the job is then suspended."""
        tenant = self.tenant
        (pod,) = tenant.pods()
        report = {"attempt": self._attempt("train", 1), "stage": "train", "time": "2026-01-01T00:00:00"}
        with tenant.held(pod):
            self._from_within(pod, {"time": (f"{JOB}-train-report", {"data": {"train": json.dumps(report)}})})
            status = tenant.wait(lambda status: _ignored(status), "the report to be set aside", 120)
            self.ignored = _ignored(status)
            tenant.patch({"spec": {"suspend": True}})
        tenant.wait(lambda status: is_true(status, "Suspended"), "Suspended", 180)
        self.pods_while_suspended = len(tenant.pods())

    def _forge_and_plant(self) -> None:
        """A report in Evaluate's name, a report that cannot be deleted, and links to tokens in the export."""
        tenant = self.tenant
        pod = tenant.pods(attempt=2)[0]
        results = {"metrics": [], "gate": {"passed": True, "sentence": "Better than the base model by far."}}
        time = tenant.status()["attempts"][-1]["started"]
        forged = {"attempt": self._attempt("evaluate", 1), "stage": "evaluate", "time": time, "done": True}
        data = {"data": {"evaluate": json.dumps(forged | {"results": results})}}
        own = f"{JOB}-train-report"
        with tenant.held(pod):
            self._from_within(
                pod,
                {
                    "into Evaluate's report": (f"{JOB}-evaluate-report", data),
                    "beside its own report": (own, data),
                    "never to be deleted": (own, {"metadata": {"finalizers": ["example.com/keep"]}}),
                },
                [
                    ("assets/digest.json", "/var/run/secrets/finetune/publish"),
                    ("report.txt", "/var/run/secrets/finetune-report/token"),
                ],
            )

    def _from_within(
        self, pod: Resource, patches: dict[str, tuple[str, Any]], links: list[tuple[str, str]] | None = None
    ) -> None:
        tenant = self.tenant
        given = {"namespace": tenant.namespace, "patches": list(patches.values()), "links": links or []}
        given["export"] = f"{RUN_VOLUME}/{tenant.run}/export"
        name = pod["metadata"]["name"]
        codes = json.loads(tenant.kubectl("exec", name, "--", "python", "-c", _IN_THE_POD, json.dumps(given)))
        self.codes |= dict(zip(patches, codes, strict=True))

    def _attempt(self, stage: str, number: int) -> str:
        return f"{self.tenant.job()['metadata']['uid']}/{stage}/{number}"

    def _everything(self) -> str:
        """Objects, logs and published files."""
        tenant, found = self.tenant, list[Any]()
        for kind in ("FineTuneJob", "ConfigMap", "Pod", "Job"):
            found += tenant.api.objects(kind, tenant.namespace)
        for pod in tenant.api.objects("Pod", tenant.namespace):
            with contextlib.suppress(ApiError):
                found.append(tenant.api.request("GET", tenant.api.path_of(pod, "log")))
        found += [
            tenant.read(path) for path in ("reports/evaluate-1.json", "export/digest.json", "metrics/train.jsonl")
        ]
        return json.dumps(found)

    def stolen(self) -> list[str]:
        """Tokens in what can be read or was published."""
        uploads = b"".join(b"".join(repo.files.values()) for repo in self.tenant.hub.repos.values()).decode(
            errors="replace"
        )
        return [token for token in (READ_TOKEN, WRITE_TOKEN) if token in self.seen + uploads]


def _ignored(status: Resource) -> str:
    messages = [condition["message"] for condition in status.get("conditions", [])]
    return next((message for message in messages if "Its report is ignored" in message), "")


def failure(status: Resource) -> str:
    """Why a job failed."""
    return str(condition_of(status, "Failed").get("message", ""))
