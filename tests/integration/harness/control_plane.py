"""etcd, kube-apiserver, kube-controller-manager and the training-operator on loopback.

There are no nodes: pods stay as they are until a test plays the kubelet (`fake_kubelet`).
Everything lives in one temporary folder and dies with the test process, however that ends.
Run `python -m tests.integration.harness.control_plane` for one to use by hand.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from . import binaries
from .api import Api, ApiError, Resource
from .processes import free_ports, wait_until
from .programs import (
    START_TIMEOUT_SECONDS,
    TRAINING_OPERATOR_NAMESPACE,
    WEBHOOK_CONFIGURATION,
    WEBHOOK_PATH,
    Programs,
    webhook_configuration,
    write_kubeconfig,
)

KUBECONFIG_VARIABLE = "FINETUNE_TEST_KUBECONFIG"
"""Names a cluster to use instead of starting one. Not KUBECONFIG: tests must never reach a cluster by accident."""


class ControlPlane:
    """A running control plane, or a given cluster behind the same interface.

    Use as a context manager, or through the fixture `control_plane`.
    """

    def __init__(self, *, folder: Path, kubeconfig: Path, owned: bool) -> None:
        self.folder = folder
        self.kubeconfig = kubeconfig
        self.owned = owned
        self.keep_folder = False
        self._serial = itertools.count(1)
        self._collected: set[str] = set()
        """Uids of the CRDs that the garbage collector knows."""
        self._api: Api | None = None
        self._programs: Programs | None = None

    @classmethod
    def own(cls) -> ControlPlane:
        """Return a control plane of our own, not yet started."""
        folder = Path(tempfile.mkdtemp(prefix="finetune-control-plane-"))
        return cls(folder=folder, kubeconfig=folder / "admin.kubeconfig", owned=True)

    @classmethod
    def given(cls, kubeconfig: Path) -> ControlPlane:
        """Return an existing cluster; the training-operator has to be installed in it."""
        folder = Path(tempfile.mkdtemp(prefix="finetune-given-cluster-"))
        return cls(folder=folder, kubeconfig=kubeconfig, owned=False)

    @classmethod
    def from_environment(cls) -> ControlPlane:
        """Return the cluster that the environment names, else one of our own."""
        given = os.environ.get(KUBECONFIG_VARIABLE)
        return cls.given(Path(given)) if given else cls.own()

    def __enter__(self) -> ControlPlane:
        try:
            self.start()
        except BaseException as error:
            error.add_note(f"Logs of the control plane are kept in {self.folder}")
            self.keep_folder = True
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep_folder = self.keep_folder or error is not None
        self.stop()

    def start(self) -> None:
        """Start everything and return when PyTorchJobs are served and reconciled."""
        if self.owned:
            self._programs = self._make_programs()
            self._programs.start_api_server()
            self._programs.wait_for_api_server(self.api)
            self._install_training_operator()
            self._programs.start_controllers(self.training_operator_kubeconfig())
            self._programs.wait_for_controllers()
            self._wait_for_garbage_collector()

    def _make_programs(self) -> Programs:
        # A quarter of the API server's time went to collecting garbage: half as often costs some 200 MB.
        return Programs(self.folder, {"GOGC": "200"})

    def stop(self) -> None:
        """Kill everything; the folder with the logs stays if `keep_folder` is set."""
        if self._programs:
            self._programs.stop()
        if not self.keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def api(self) -> Api:
        """The API server, as cluster administrator."""
        if self._api is None:
            self._api = Api(self.kubeconfig)
        return self._api

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return str(_cluster_of(self.kubeconfig)["server"])

    @property
    def ca_file(self) -> Path:
        """The certificate authority of the API server, for a proxy in front of it."""
        return self._own().folder / "ca.crt"

    def apply(self, source: Path | str | Resource | Iterable[Resource], namespace: str | None = None) -> list[Resource]:
        """Apply a YAML file, YAML text, or objects; `namespace` is for those that state none."""
        return [self.api.apply(manifest, namespace) for manifest in _manifests(source)]

    def install_crds(self, source: Path | str | Resource | Iterable[Resource]) -> None:
        """Apply CRDs, and return when objects of these kinds are served *and* garbage-collected.

        The garbage collector looks for new kinds every 30 s only, and until then the deletion of
        an owner goes unnoticed, so for new ones the controller manager is restarted, which takes about a second.
        """
        served = set()
        for definition in self.apply(source):
            self._wait_until_established(definition)
            served.add(definition["metadata"]["uid"])
        if self._programs and not served <= self._collected:
            self._programs.restart_controller_manager()
            self._wait_for_garbage_collector()
            self._collected |= served

    def create_namespace(self, prefix: str = "test", labels: Mapping[str, str] | None = None) -> str:
        """Create a namespace with a name of its own and return it once pods can be created in it."""
        name = f"{prefix}-{next(self._serial)}-{secrets.token_hex(2)}"
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels or {})}}
        self.api.create(manifest)
        wait_until(lambda: self.api.find("ServiceAccount", "default", name), f"the service account of {name}")
        return name

    def delete_namespace(self, name: str) -> None:
        """Delete a namespace and whatever pods no kubelet will ever finish; does not wait.

        In a control plane of our own only its FineTuneJobs, which tests of all namespaces would see: the rest goes with
        the control plane, and to empty a namespace is work for it that the next test would wait for.
        """
        if self.owned:
            wait_until(lambda: self._delete_fine_tune_jobs(name), f"the jobs of {name} to be deleted")
            return
        self.api.delete({"kind": "Namespace", "metadata": {"name": name}})
        for pod in self.api.objects("Pod", name):
            self.api.delete(pod, grace_seconds=0)

    def kubeconfig_for(self, service_account: str, namespace: str, server: str | None = None) -> Path:
        """Write a kubeconfig that has exactly the rights of a service account, and return its path.

        `server` puts something else in front of the API server, such as a proxy that fails on
        purpose; with an `http` address the certificate authority is left out.
        """
        token = self._token(service_account, namespace)
        cluster = dict(_cluster_of(self.kubeconfig))
        if server:
            cluster["server"] = server
        if cluster["server"].startswith("http://"):
            cluster = {"server": cluster["server"]}
        path = self.folder / f"{namespace}-{service_account}-{next(self._serial)}.kubeconfig"
        write_kubeconfig(path, cluster, {"token": token}, namespace)
        return path

    def audit_events(self, user: str | None = None) -> list[Resource]:
        """Return what the API server was asked so far, oldest first, at the level Metadata.

        A user of a service account is named `system:serviceaccount:<namespace>:<name>`. A watch
        appears when it starts and again when it ends.
        """
        log = self._own().folder / "audit.log"
        lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
        # Parsed is only what may be of that user: the whole log of many tests would take a minute.
        events: list[Resource] = [json.loads(line) for line in lines if user is None or user.encode() in line]
        return [event for event in events if user is None or event["user"].get("username") == user]

    def stop_training_operator(self) -> None:
        """Stop the training-operator and with it its webhook: PyTorchJobs can then not be created."""
        self._running().training_operator.stop()

    def start_training_operator(self) -> None:
        """Start the training-operator again and wait until it and its webhook serve."""
        programs = self._running()
        programs.training_operator.start()
        programs.wait_for_training_operator()

    @contextlib.contextmanager
    def webhook_down(self, namespace: str) -> Iterator[None]:
        """Make the creation of PyTorchJobs in one namespace fail as while the webhook starts.

        The API server answers 500 InternalError "failed calling webhook ... connection refused".
        """
        (silent_port,) = free_ports(1)
        configuration = webhook_configuration(
            f"unreachable-in-{namespace}",
            f"https://127.0.0.1:{silent_port}{WEBHOOK_PATH}",
            ca_bundle=None,
            namespace_selector={"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        )
        created = self.api.create(configuration)
        try:
            wait_until(lambda: not self._accepts_pytorchjobs(namespace), "the webhook to be asked")
            yield
        finally:
            self.api.delete(created)
            wait_until(lambda: self._accepts_pytorchjobs(namespace), "the webhook to be forgotten")

    def set_webhook_enabled(self, enabled: bool) -> None:
        """Register the training-operator's own validating webhook (the default), or remove it."""
        if enabled:
            self.api.apply(self._running().webhook_configuration())
        else:
            self.api.delete({"kind": "ValidatingWebhookConfiguration", "metadata": {"name": WEBHOOK_CONFIGURATION}})

    def training_operator_kubeconfig(self) -> Path:
        """Return a kubeconfig with the rights of the training-operator's own ClusterRole."""
        return self.kubeconfig_for("training-operator", TRAINING_OPERATOR_NAMESPACE)

    def permissions_used(self, user: str) -> set[tuple[str, str, str]]:
        """Return (API group, resource or resource/subresource, verb) of all that a user was allowed to do.

        In the words of a Role, so that what a chart grants can be compared with what is used.
        """
        references = [
            (event["objectRef"], event["verb"])
            for event in self.audit_events(user)
            if "objectRef" in event and event["responseStatus"]["code"] != 403
        ]
        return {
            (reference.get("apiGroup", ""), "/".join(_resource_and_subresource(reference)), verb)
            for reference, verb in references
        }

    def log(self, program: str) -> str:
        """Return what a program (`kube-apiserver`, `etcd`, ...) has written so far."""
        return (self._own().folder / f"{program}.log").read_text(errors="replace")

    def _install_training_operator(self) -> None:
        """Install what the training-operator's own manifests install, but for its Deployment."""
        programs = self._running()
        manifests = binaries.ensure_training_operator_manifests()
        self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TRAINING_OPERATOR_NAMESPACE}})
        for definition in self.apply(manifests / "crds" / "kubeflow.org_pytorchjobs.yaml"):
            self._wait_until_established(definition)
        for path in sorted((manifests / "rbac").glob("*.yaml")):
            for manifest in _manifests(path):
                for subject in manifest.get("subjects", []):
                    subject["namespace"] = TRAINING_OPERATOR_NAMESPACE
                self.api.apply(manifest, TRAINING_OPERATOR_NAMESPACE)
        self.api.apply(programs.webhook_secret(), TRAINING_OPERATOR_NAMESPACE)
        self.api.apply(programs.webhook_configuration())

    def _wait_until_established(self, definition: Resource) -> None:
        def established() -> bool:
            present = self.api.refresh(definition) or {}
            conditions = present.get("status", {}).get("conditions") or []
            return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

        wait_until(established, f"{definition['metadata']['name']} to be served")

    def _wait_for_garbage_collector(self) -> None:
        """Wait until an orphan is collected: the collector begins only when it watches every kind."""
        absent = {"apiVersion": "v1", "kind": "ConfigMap", "name": "absent", "uid": str(uuid.uuid4())}
        metadata = {"generateName": "orphan-", "namespace": "default", "ownerReferences": [absent]}
        orphan = self.api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
        wait_until(lambda: self.api.refresh(orphan) is None, "the garbage collector", START_TIMEOUT_SECONDS)

    def _accepts_pytorchjobs(self, namespace: str) -> bool:
        """Whether a PyTorchJob gets past the webhooks: being refused as invalid is getting past them."""
        probe = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "probe"}}
        spec: Resource = {"pytorchReplicaSpecs": {"Worker": {"template": {"spec": {"containers": []}}}}}
        try:
            self.api.apply({**probe, "spec": spec}, namespace, dry_run=True)
        except ApiError as error:
            return "failed calling webhook" not in error.message
        return True

    def _delete_fine_tune_jobs(self, namespace: str) -> bool:
        """Whether that was done; for a moment after their CRD was changed the API server does not."""
        try:
            self.api.request("DELETE", self.api.endpoint("FineTuneJob").path(namespace))
        except ApiError as error:
            if error.code != 429:
                raise
            return False
        except LookupError:
            pass  # No such kind: no test has asked for it yet.
        return True

    def _token(self, service_account: str, namespace: str) -> str:
        target = {"kind": "ServiceAccount", "metadata": {"name": service_account, "namespace": namespace}}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 24 * 3600},
        }
        answer = self.api.request("POST", self.api.path_of(target, "token"), request)
        return str(answer["status"]["token"])

    def _own(self) -> ControlPlane:
        if not self.owned:
            raise RuntimeError("This needs a control plane of the tests' own; unset " + KUBECONFIG_VARIABLE + ".")
        return self

    def _running(self) -> Programs:
        if self._own()._programs is None:
            raise RuntimeError("The control plane is not started.")
        assert self._programs is not None
        return self._programs


def _resource_and_subresource(reference: Resource) -> list[str]:
    return [reference[part] for part in ("resource", "subresource") if reference.get(part)]


def _cluster_of(kubeconfig: Path) -> Resource:
    """Return the cluster entry of a kubeconfig's current context."""
    content: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
    contexts = {context["name"]: context["context"] for context in content["contexts"]}
    clusters: dict[str, Resource] = {cluster["name"]: cluster["cluster"] for cluster in content["clusters"]}
    return clusters[contexts[content["current-context"]]["cluster"]]


def _manifests(source: Path | str | Resource | Iterable[Resource]) -> list[Resource]:
    if isinstance(source, Path):
        source = source.read_text()
    if isinstance(source, str):
        return [manifest for manifest in yaml.safe_load_all(source) if manifest]
    if isinstance(source, dict):
        return [source]
    return list(source)


def is_given() -> bool:
    """Whether the environment names a cluster to use instead of one of our own."""
    return bool(os.environ.get(KUBECONFIG_VARIABLE))


def main() -> None:
    """Keep a control plane running until interrupted, for a look around or for many short test runs."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ControlPlane.own() as control_plane:
        print(f"export {KUBECONFIG_VARIABLE}={control_plane.kubeconfig}", flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
