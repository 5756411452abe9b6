"""Our own operator as a process, under the rights that the chart gives it, and the trainer played by the test."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.support.time_limits import scaled
from tests.unit.finetune_operator.decision.world import job as world

from finetune_api.report import Report
from finetune_api.runconfig import Attempt

from .api import Api, ApiError, Resource
from .control_plane import ControlPlane
from .fake_kubelet import Exit
from .forking import fork_operator
from .helm import Helm
from .processes import TimedOutError, free_ports, wait_until

ACCOUNT = "finetune-finetune-operator"
Right = tuple[str, str, str]
"""API group, resource or resource/subresource, verb."""


TUNED = {"SECRET_POLL_SECONDS": 2.0, "TRANSIENT_POLL_SECONDS": 2.0, "POD_CREATION_SECONDS": 10.0}
"""Constants of the operator for which tests would only wait: how often it asks again, how long it says nothing."""


class OperatorProcess:
    """`finetune operator` for one namespace, from here to `stop` or `kill`."""

    def __init__(
        self,
        control_plane: ControlPlane,
        helm: Helm,
        namespace: str,
        ops: str,
        *,
        values: Resource | None = None,
        tuned: Mapping[str, float] | None = None,
    ) -> None:
        self.ops, self.account = ops, ACCOUNT
        given = values or {}
        control_plane.apply(rights_in_the_chart(helm, namespace, ops, given), ops)
        self.kubeconfig = control_plane.kubeconfig_for(ACCOUNT, ops)
        self.log = control_plane.folder / f"operator-{namespace}.log"
        self.health_port, self.metrics_port = free_ports(2)
        self._environment = {
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(self.kubeconfig),
            "FINETUNE_NAMESPACES": namespace,
            "FINETUNE_BACKEND": given.get("backend", "pytorchjob"),
            "FINETUNE_TRAINER_IMAGE": "trainer.example/trainer@sha256:" + "0" * 64,
            "FINETUNE_LEASE_NAME": ACCOUNT,
            "FINETUNE_LEASE_NAMESPACE": ops,
            "FINETUNE_HEALTH_PORT": str(self.health_port),
            "FINETUNE_METRICS_PORT": str(self.metrics_port),
            "FINETUNE_BACKOFF_BASE_SECONDS": "1",
            "FINETUNE_PRICE_PER_GPU_HOUR": "2",
            "FINETUNE_GRACE_SECONDS": "5",
            "FINETUNE_LEASE_SECONDS": "3",
        }
        self._tuned = TUNED | dict(tuned or {})
        self._process: ForkServerProcess | None = None

    def twin(self, kubeconfig: Path | None = None) -> OperatorProcess:
        """A second replica, not started; it may have a way to the API server of its own."""
        made = copy.copy(self)
        health, metrics = free_ports(2)
        ports = {"FINETUNE_HEALTH_PORT": str(health), "FINETUNE_METRICS_PORT": str(metrics)}
        made.health_port, made.metrics_port, made._process = health, metrics, None
        made.kubeconfig = kubeconfig or self.kubeconfig
        made._environment = self._environment | ports | {"KUBECONFIG": str(made.kubeconfig)}
        made.log = self.log.with_suffix(f".{health}.log")
        return made

    def get(self, path: str, port: int) -> tuple[int, str]:
        """Ask one of its HTTP ports; code 0 if nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""

    def start(self) -> OperatorProcess:
        """Start it; whatever it says goes to its log."""
        self._process = fork_operator(self._environment, self.log, self._tuned)
        return self

    def program(self) -> subprocess.Popen[bytes]:
        """Start it as its users do, not forked; the caller ends it."""
        with self.log.open("ab") as log:
            command = [str(Path(sys.executable).parent / "finetune"), "operator"]
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def stop(self) -> int:
        """End it as Kubernetes does; returns its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self.ends()

    def ends(self, seconds: float = 30) -> int:
        """Wait until it ends by itself; returns its exit code."""
        assert self._process is not None
        self._process.join(scaled(seconds))
        code = self._process.exitcode
        if code is None:
            raise TimedOutError(f"After {scaled(seconds):.3g} s the operator still runs.")
        return code

    def kill(self) -> None:
        """End it without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def words(self) -> str:
        """Everything that it logged."""
        return self.log.read_text(errors="replace")


def rights_in_the_chart(helm: Helm, namespace: str, ops: str, values: Resource) -> list[Resource]:
    """The chart's account and roles for an operator in `ops` that serves a namespace; rendered once for such values."""
    rbac = {"aggregate": False, "protectReports": "never"}
    own: Resource = {"namespaces": ["served-namespace"], "crd": {"install": False}, "rbac": rbac}
    merged = own | values | {"rbac": rbac | values.get("rbac", {})}
    text = json.dumps(merged)
    if text not in _RENDERED:
        made = helm.template(merged, namespace="operators-namespace")
        _RENDERED[text] = json.dumps([manifest for manifest in made if manifest["kind"] in RIGHTS])
    placed = _RENDERED[text].replace("served-namespace", namespace).replace("operators-namespace", ops)
    found: list[Resource] = json.loads(placed)
    return found


RIGHTS = (
    *("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"),
    *("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
)
_RENDERED: dict[str, str] = {}


class Trainer:
    """Writes reports as the trainer's pods do, and says how pods end."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace

    def succeeds(self, pod: Resource) -> Exit | None:
        """The script of a pod whose attempt does all that it should: a report, then exit 0."""
        attempt = attempt_of(pod)
        if attempt is None:
            return None
        self.report(pod, attempt, done=True, **world().product(attempt.stage))
        return Exit()

    def report(self, pod: Resource, attempt: Attempt, **fields: object) -> None:
        """Patch the job's report ConfigMap as the pod would."""
        report = Report.model_validate(
            {"attempt": attempt.id, "stage": attempt.stage, "time": datetime.now(UTC), **fields}
        )
        variable = environment_of(pod)["FINETUNE_REPORT_CONFIGMAP"]
        target = {"kind": "ConfigMap", "metadata": {"namespace": self._namespace, "name": variable.partition("/")[2]}}
        self._api.patch(target, {"data": {attempt.stage: json.dumps(report.to_wire())}})


def environment_of(pod: Resource) -> dict[str, str]:
    """The variables of a pod's container that are given by value."""
    return {v["name"]: v["value"] for v in pod["spec"]["containers"][0].get("env", []) if "value" in v}


def attempt_of(pod: Resource) -> Attempt | None:
    """The attempt that a pod was told to be of."""
    text = environment_of(pod).get("FINETUNE_ATTEMPT")
    return None if text is None else Attempt.model_validate_json(text)


def wait_for_job(
    api: Api, name: str, namespace: str, condition: Callable[[Resource], object], what: str, seconds: float = 60
) -> Resource:
    """Wait until a FineTuneJob's status is as wanted, and return the job."""

    def seen() -> Resource | None:
        try:
            found = api.get("FineTuneJob", name, namespace)
        except ApiError:
            return None
        return found if condition(found.get("status") or {}) else None

    return wait_until(seen, f"FineTuneJob {name} to be {what}", seconds)


def is_true(kind: str) -> Callable[[Resource], bool]:
    """Whether a status has that condition."""
    return lambda status: any(c["type"] == kind and c["status"] == "True" for c in status.get("conditions", []))


def fine_tune_job(name: str, **spec: object) -> Resource:
    """A job of three nodes that publishes; fields of the spec may be replaced."""
    base: Resource = {
        "model": {"repo": "acme/base"},
        "datasets": [{"name": "claims", "repo": "acme/claims", "task": "classification"}],
        "tuning": {"method": "lora"},
        "topology": {"nodes": 3, "gpusPerNode": 4, "gpuType": "A100-80GB"},
        "publish": {"repo": "acme/support"},
        "credentials": {"hub": {"name": "hf-read"}, "publish": {"name": "hf-write"}},
    }
    metadata = {"name": name}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": base | spec}


def furnish(api: Api, namespace: str) -> None:
    """What a user of the namespace has made: two tokens and the shared cache."""
    for name in ("hf-read", "hf-write"):
        api.create(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"token": "hf_x"}},
            namespace,
        )
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
    metadata = {"name": "finetune-cache"}
    api.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claim}, namespace)


def rights(role: Resource) -> set[Right]:
    """Every right of a Role."""
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
