"""docs/runpod.md with the image as it is: three containers, one shared folder, the variables that RunPod sets."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.cluster.images import names
from tests.cluster.node import ctr
from tests.cluster.places import CGROUP, NODE_ADDRESS, Places
from tests.integration.harness.processes import free_ports
from tests.support.tiny import days

from finetune_operator.planning.manifests.pod import USER

from .place import job_spec

MACHINES = 3


@pytest.fixture
def workspace(places: Places, base_model: Path) -> Iterator[Path]:
    """What a network volume would hold: the job, its model and its rows, writable by the image's user."""
    folder = places.volumes / "workspace"
    folder.mkdir(parents=True)
    (folder / "base").mkdir()
    for path in base_model.iterdir():
        (folder / "base" / path.name).write_bytes(path.read_bytes())
    lines = ["text,label", *(f"{text},{label}" for text, label in days(240))]
    (folder / "days.csv").write_text("\n".join(lines) + "\n")
    spec = job_spec(model={"path": "base"}, publish={"path": "published"})
    spec["datasets"][0] = {"name": "days", "path": "days.csv", "task": "classification", "template": "{{ text }}"}
    for name in ("credentials", "storage"):
        del spec[name]
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


@pytest.mark.timeout(1200)
def test_three_rented_machines_run_the_same_command_and_publish_a_better_model(
    places: Places, workspace: Path, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    logs = [tmp_path / f"machine-{number}.log" for number in range(MACHINES)]
    running = [machine(places, workspace, number, port, log) for number, log in enumerate(logs)]
    codes = [process.wait(timeout=900) for process in running]
    assert codes == [0] * MACHINES, "\n".join(log.read_text()[-3000:] for log in logs)
    (status_file,) = workspace.glob("runs/default/days/*/status.json")
    status = json.loads(status_file.read_text())
    results = (status.get("status") or status)["results"]
    (metric,) = [m for m in results["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["difference"]["low"] > 0
    assert {path.name for path in (workspace / "published").iterdir()} >= {"adapter_model.safetensors", "README.md"}
