"""Kubeflow Trainer v2 and JobSet, real and on loopback, beside a control plane: what carries TrainJobs.

Their manifests are their own, but for the addresses of their webhooks: nobody here forwards Services. They run as
cluster administrators: their rights are not ours to test.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import yaml

from . import binaries
from .api import Resource
from .certificates import Authority
from .control_plane import ControlPlane
from .processes import Process, free_ports, wait_until
from .programs import START_TIMEOUT_SECONDS

_CONFIGURATIONS: dict[str, Resource] = {
    "jobset": {"apiVersion": "config.jobset.x-k8s.io/v1alpha1", "internalCertManagement": {"enable": False}},
    "kubeflow-trainer": {"apiVersion": "config.trainer.kubeflow.org/v1alpha1", "certManagement": {"enable": False}},
}


class KubeflowTrainer:
    """Both controllers and their webhooks; use it in a `with` block."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._authority = Authority("kubeflow-trainer-test-ca")
        self._processes: list[Process] = []
        self._made: list[Resource] = []

    def __enter__(self) -> KubeflowTrainer:
        trainer, jobset = binaries.ensure_trainer_manifests(), binaries.ensure_jobset_manifests()
        crds = [*sorted((trainer / "crds").glob("trainer*.yaml")), *sorted((jobset / "crd" / "bases").glob("*.yaml"))]
        self._control_plane.install_crds([crd for path in crds for crd in yaml.safe_load_all(path.read_text()) if crd])
        try:
            # JobSet first: Kubeflow Trainer watches what JobSet serves.
            self._start("jobset", jobset / "webhook" / "manifests.yaml")
            self._start("kubeflow-trainer", trainer / "webhook" / "manifests.yaml")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for configuration in self._made:
            self._control_plane.api.delete(configuration)
        for process in self._processes:
            process.stop()

    def _start(self, name: str, webhooks: Path) -> None:
        webhook_port, probe_port = free_ports(2)
        folder = self._control_plane.folder / name
        certificates = folder / "k8s-webhook-server" / "serving-certs"
        certificates.mkdir(parents=True)
        self._authority.server(name).write(certificates, "tls")
        configuration = folder / "configuration.yaml"
        configuration.write_text(
            json.dumps(
                _CONFIGURATIONS[name]
                | {
                    "kind": "Configuration",
                    "leaderElection": {"leaderElect": False},
                    "webhook": {"port": webhook_port, "host": "127.0.0.1"},
                    "metrics": {"bindAddress": "0"},
                    "health": {"healthProbeBindAddress": f"127.0.0.1:{probe_port}"},
                    "clientConnection": {"qps": 500, "burst": 1000},
                }
            )
        )
        process = Process(
            name,
            [binaries.ensure(name), f"--config={configuration}"],
            self._control_plane.folder / f"{name}.log",
            # Webhook certificates are looked for below the folder for temporary files.
            {"KUBECONFIG": str(self._control_plane.kubeconfig), "TMPDIR": str(folder)},
        )
        self._processes.append(process)
        process.start()

        def ready() -> bool:
            process.check()
            return _answers(f"http://127.0.0.1:{probe_port}/readyz")

        wait_until(ready, f"{name} to be ready", START_TIMEOUT_SECONDS)
        for registration in self._registrations(name, webhooks, webhook_port):
            self._made.append(self._control_plane.api.apply(registration))

    def _registrations(self, name: str, source: Path, port: int) -> Iterator[Resource]:
        """The registrations of its webhooks, on loopback; without those for pods, which only place them."""
        for registration in yaml.safe_load_all(source.read_text()):
            if not registration:
                continue
            registration["metadata"]["name"] = f"{name}-{registration['metadata']['name']}"
            kept = [hook for hook in registration["webhooks"] if hook["rules"][0]["resources"] != ["pods"]]
            for hook in kept:
                path = hook["clientConfig"]["service"]["path"]
                bundle = base64.b64encode(self._authority.pair.certificate).decode()
                hook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
            yield registration | {"webhooks": kept}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
