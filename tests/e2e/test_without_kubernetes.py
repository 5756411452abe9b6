"""Without Kubernetes, and without a kubelet for two minutes: the first takes place while the second lasts.

docs/runpod.md with the image as it is: three containers, one shared folder, the variables that RunPod sets.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tests.cluster.images import names
from tests.cluster.node import ctr
from tests.cluster.places import CGROUP, NODE_ADDRESS, NODE_NAME, Places
from tests.integration.harness.processes import free_ports, wait_until
from tests.support.time_limits import scaled

from finetune_api.base import Stage
from finetune_operator.manifests.pod import NODE_LOSS_SECONDS, USER

from .another_node import AnotherNode
from .conftest import Furnish
from .tenant import AFTER_EVERY_STEP, DATASETS, DAYS, GREETINGS, Tenant, job_spec

pytestmark = pytest.mark.timeout(1200)
MACHINES = 3
AWAY_SECONDS = 120
UNREACHABLE = "node.kubernetes.io/unreachable"


@dataclass
class Alone:
    """A job that trains on while its node's kubelet is away."""

    tenant: Tenant
    pods: list[str]
    since: float
    step: int


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, furnish: Furnish, places: Places) -> Iterator[Alone]:
    """A job trains, and the kubelet is stopped; started again at the end, if the test has not."""
    failed_before = request.session.testsfailed
    with (
        furnish("kubelet-away", lambda: request.session.testsfailed > failed_before) as tenant,
        AnotherNode(tenant.api),
    ):
        one = {"nodes": 1, "gpusPerNode": 0}
        tenant.apply(publish=None, topology=one, training__epochs=1000, checkpoint=AFTER_EVERY_STEP)
        tenant.trained_to(1)
        pods = [pod["metadata"]["uid"] for pod in tenant.pods()]
        places.kubelet_away_file.touch()
        try:
            yield Alone(tenant, pods, time.monotonic(), max(tenant.losses()))
        finally:
            places.kubelet_away_file.unlink(missing_ok=True)
            wait_until(lambda: node_is(tenant, "True"), "the node to be ready again", 120)


def node_is(tenant: Tenant, ready: str) -> bool:
    conditions = tenant.api.get("Node", NODE_NAME)["status"]["conditions"]
    return any(c["type"] == "Ready" and c["status"] == ready for c in conditions)


@pytest.fixture
def workspace(places: Places, base_model: Path) -> Iterator[Path]:
    """What a network volume would hold: the job, its model and its rows, writable by the image's user."""
    folder = places.volumes / "workspace"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    (folder / "base").mkdir(parents=True)
    for path in base_model.iterdir():
        (folder / "base" / path.name).write_bytes(path.read_bytes())
    datasets = []
    for dataset in (DAYS, GREETINGS):
        ((file, content),) = DATASETS[dataset["name"]].items()
        (folder / file).write_text(content)
        datasets.append({"path": file} | {name: value for name, value in dataset.items() if name != "repo"})
    spec = job_spec(model={"path": "base"}, publish={"path": "published"}, datasets=datasets)
    del spec["credentials"]
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "days"}, "spec": spec}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(folder)], check=True)
    yield folder
    for number in range(MACHINES):
        ctr(places, "tasks", "rm", "--force", f"machine-{number}", check=False)
        ctr(places, "containers", "rm", f"machine-{number}", check=False)
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def machine(places: Places, workspace: Path, number: int, port: int, log: Path) -> subprocess.Popen[bytes]:
    """One rented machine: a container of the trainer's image that runs what the guide says."""
    variables = {
        "NUM_NODES": MACHINES,
        "NODE_RANK": number,
        "PRIMARY_ADDR": NODE_ADDRESS,
        "PRIMARY_PORT": port,
        "NODE_ADDR": NODE_ADDRESS,
        "NUM_TRAINERS": 1,
        "FINETUNE_CACHE": "/workspace/cache",
        "OMP_NUM_THREADS": 1,
    }
    command = ["ctr", "--address", str(places.socket), "--namespace", "k8s.io", "run", "--rm", "--net-host"]
    command += ["--read-only", "--cgroup", f"/{CGROUP}/machine-{number}"]
    for kind, source, target in (("bind", workspace, "/workspace"), ("tmpfs", "tmpfs", "/tmp")):
        options = "options=rbind:rw" if kind == "bind" else "options=mode=1777"
        command += ["--mount", f"type={kind},src={source},dst={target},{options}"]
    for name, value in variables.items():
        command += ["--env", f"{name}={value}"]
    command += [names()["trainer"], f"machine-{number}"]
    command += ["finetune", "run", "/workspace/job.yaml", "--workdir", "/workspace/runs"]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def test_three_rented_machines_run_the_same_command_and_publish_a_better_model(
    places: Places, workspace: Path, tmp_path: Path, alone: Alone
) -> None:
    (port,) = free_ports(1)
    logs = [tmp_path / f"machine-{number}.log" for number in range(MACHINES)]
    running = [machine(places, workspace, number, port, log) for number, log in enumerate(logs)]
    codes = [process.wait(timeout=scaled(900)) for process in running]
    assert codes == [0] * MACHINES, "\n".join(log.read_text()[-3000:] for log in logs)
    (status_file,) = workspace.glob("runs/default/days/*/status.json")
    status = json.loads(status_file.read_text())
    results = (status.get("status") or status)["results"]
    (metric,) = [m for m in results["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["difference"]["low"] > 0
    assert {path.name for path in (workspace / "published").iterdir()} >= {"adapter_model.safetensors", "README.md"}


def test_a_kubelet_that_is_away_for_two_minutes_disturbs_no_training_and_uses_no_attempt(
    places: Places, alone: Alone
) -> None:
    tenant = alone.tenant
    wait_until(lambda: time.monotonic() - alone.since > AWAY_SECONDS, "two minutes to pass", AWAY_SECONDS + 30)
    assert node_is(tenant, "Unknown")
    taints = tenant.api.get("Node", NODE_NAME)["spec"].get("taints", [])
    assert (UNREACHABLE, "NoExecute") in {(taint["key"], taint["effect"]) for taint in taints}
    assert AWAY_SECONDS <= NODE_LOSS_SECONDS
    meanwhile = max(tenant.losses())
    assert meanwhile > alone.step

    places.kubelet_away_file.unlink()
    wait_until(lambda: node_is(tenant, "True"), "the node to be ready again", 120)
    tenant.trained_to(max(tenant.losses()) + 2)
    (pod,) = tenant.pods()
    assert [pod["metadata"]["uid"]] == alone.pods
    assert "deletionTimestamp" not in pod["metadata"]
    attempts = [a for a in tenant.status()["attempts"] if a["stage"] == Stage.TRAIN]
    assert [(a["number"], a.get("outcome", "running")) for a in attempts] == [(1, "running")]
