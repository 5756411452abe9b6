"""What others read from a job's conditions: `kubectl wait` in every state, and kstatus at every single write."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.time_limits import scaled

from finetune_api.base import Stage

from .harness.api import Resource
from .harness.control_plane import ControlPlane
from .harness.job_scenario import NAME, JobScenario, failing
from .harness.processes import wait_until

SUMMARY = ("Ready", "Reconciling", "Stalled", "Complete", "Failed", "Suspended")
STATES = {
    "progressing": {"Reconciling"},
    "suspended": {"Suspended"},
    "complete": {"Ready", "Complete"},
    "failed": {"Stalled", "Failed"},
}


class Kubectl:
    """`kubectl` about the scenario's job."""

    def __init__(self, kubeconfig: Path, namespace: str, folder: Path) -> None:
        self._command = ["kubectl", f"--kubeconfig={kubeconfig}", f"--namespace={namespace}"]
        self._folder = folder

    def wait(self, condition: str) -> None:
        """Wait until the job has a condition; `Ready=false` asks for the opposite."""
        arguments = ["wait", f"ftj/{NAME}", f"--for=condition={condition}", f"--timeout={scaled(60):.0f}s"]
        subprocess.run([*self._command, *arguments], check=True, timeout=scaled(90), capture_output=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Path]:
        """The file to which every version of the jobs of the namespace is written."""
        path = self._folder / "watched.json"
        with path.open("wb") as out:
            process = subprocess.Popen([*self._command, "get", "ftj", "--watch", "-o", "json"], stdout=out)
            try:
                yield path
            finally:
                process.terminate()
                process.wait(timeout=scaled(10))


@pytest.fixture
def kubectl(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Kubectl:
    """The program; the test is skipped without it."""
    if shutil.which("kubectl") is None:
        pytest.skip("There is no kubectl on this machine.")
    return Kubectl(control_plane.kubeconfig, namespace, tmp_path)


def test_kubectl_waits_for_every_state(scenario: JobScenario, kubectl: Kubectl) -> None:
    scenario.apply(retry={"limit": 0})
    for condition in ("Reconciling", "Ready=false", "Failed=false", "Published=false"):
        kubectl.wait(condition)
    scenario.patch({"spec": {"suspend": True}})
    for pod in scenario.api.objects("Pod", scenario.namespace):
        scenario.api.delete(pod, grace_seconds=0)
    kubectl.wait("Suspended")
    scenario.patch({"spec": {"suspend": False}})
    (pod,) = scenario.pods(1, Stage.PREPARE, number=2)
    scenario.kubelet.end(scenario.kubelet.run(pod), failing("bad-data", 0, "claims.csv, row 7: no label."))
    for condition in ("Failed", "Stalled", "Reconciling=false"):
        kubectl.wait(condition)
    scenario.patch({"metadata": {"annotations": {"finetune.dev/retry": "1"}}})
    kubectl.wait("Failed=false")
    scenario.carry_on()
    for condition in ("Complete", "Ready", "Prepared", "Trained", "Evaluated", "Published", "Stalled=false"):
        kubectl.wait(condition)


def test_every_write_is_a_row_of_the_table_and_kstatus_never_speaks_too_early(
    scenario: JobScenario, kubectl: Kubectl
) -> None:
    with kubectl.watching() as path:
        wait_until(lambda: path.exists(), "the watch")
        scenario.apply(retry={"limit": 0})
        scenario.until_train()
        scenario.patch({"spec": {"suspend": True}})
        for pod in scenario.pods_terminating():
            scenario.kubelet.finish_termination(pod, failing("preempted", 0))
        scenario.reason("Suspended")
        scenario.patch({"spec": {"suspend": False}})
        for pod in scenario.pods(3, Stage.TRAIN, number=2):
            scenario.kubelet.end(scenario.kubelet.run(pod), failing("crash", 0))
        scenario.reason("Crash")
        scenario.patch({"metadata": {"annotations": {"finetune.dev/retry": "1"}}})
        last = scenario.carry_on()
        versions = wait_until(lambda: seen_up_to(path, last), "the watch to have seen the end")
    told = [kstatus(version) for version in versions]
    # Suspended is not done: it is InProgress to kstatus, as it stands on Ready=False.
    changes = [word for word, before in zip(told, [None, *told], strict=False) if word != before]
    assert changes == ["InProgress", "Failed", "InProgress", "Current"]
    generations = [version["status"]["observedGeneration"] for version in versions if "status" in version]
    assert generations == sorted(generations)
    for version in versions:
        if "status" in version:
            holds = {kind for kind in SUMMARY if conditions(version)[kind]["status"] == "True"}
            assert holds in STATES.values()


def seen_up_to(path: Path, last: Resource) -> list[Resource] | None:
    """Every version that the watch has seen, once the status is as it was at last."""
    text, decoder, found, position = path.read_text(), json.JSONDecoder(), [], 0
    with contextlib.suppress(json.JSONDecodeError):
        while position < len(text):
            version, position = decoder.raw_decode(text, position)
            position += len(text[position:]) - len(text[position:].lstrip())
            found.append(version)
    return found if found and found[-1].get("status") == last else None


def conditions(version: Resource) -> dict[str, Resource]:
    """The conditions of a version by type."""
    return {condition["type"]: condition for condition in version["status"]["conditions"]}


def kstatus(version: Resource) -> str:
    """How kstatus reads a custom resource: its generation, then Reconciling and Stalled, then Ready."""
    status = version.get("status", {})
    if status.get("observedGeneration") != version["metadata"]["generation"]:
        return "InProgress"
    found = {kind: condition["status"] for kind, condition in conditions(version).items()}
    if found["Reconciling"] == "True":
        return "InProgress"
    if found["Stalled"] == "True":
        return "Failed"
    return "Current" if found["Ready"] == "True" else "InProgress"
