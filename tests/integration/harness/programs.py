"""The four programs of a control plane: their flags, files, ports, and when each is ready.

Knows nothing of tests; `control_plane` decides what is installed between the starts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import urllib3
import yaml

from . import binaries
from .api import Api, Resource
from .certificates import Authority, signing_key
from .processes import Process, free_ports, wait_until

START_TIMEOUT_SECONDS = 120
"""Generous, because two busy cores take several times the usual seconds."""

CONTROLLERS = (
    "clusterrole-aggregation-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "persistentvolume-binder-controller",
    "persistentvolume-protection-controller",
    "persistentvolumeclaim-protection-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "ttl-after-finished-controller",
)
"""No node lifecycle and no eviction: the fake kubelet decides when a node is lost."""

TRAINING_OPERATOR_NAMESPACE = "kubeflow"
WEBHOOK_CONFIGURATION = "validator.training-operator.kubeflow.org"
_WEBHOOK_SECRET = "training-operator-webhook-cert"
WEBHOOK_PATH = "/validate-kubeflow-org-v1-pytorchjob"
# Compiled into the training-operator. It only asks whether the file is there; what it serves
# comes from the same folders under TMPDIR, which is ours.
_WEBHOOK_MARKER = Path("/tmp/k8s-webhook-server/serving-certs/tls.crt")

_AUDIT_POLICY: Resource = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        # What the control plane does among itself is not evidence of anything.
        {"level": "None", "users": ["system:apiserver", "system:kube-controller-manager"]},
        {"level": "None", "nonResourceURLs": ["/healthz*", "/readyz*", "/livez*"]},
        {"level": "Metadata"},
    ],
}


class Programs:
    """The four processes, their ports, certificates and flags."""

    def __init__(self, folder: Path, api_server_environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._etcd_port, self._etcd_peer_port, self._api_port, *others = free_ports(6)
        self._manager_port, self._webhook_port, self._probe_port = others
        self._authority = Authority("finetune-test-ca")
        # The rotation inside the training-operator accepts a CA of exactly this name, and else makes its own.
        self._webhook_authority = Authority("training-operator-ca")
        self._webhook_server = self._webhook_authority.server(f"training-operator.{TRAINING_OPERATOR_NAMESPACE}.svc")
        self._write_files()
        self._etcd = self._process("etcd", self._etcd_flags())
        self._api_server = self._process("kube-apiserver", self._api_server_flags(), api_server_environment)
        self._manager = self._process("kube-controller-manager", self._manager_flags())
        self._training_operator: Process | None = None

    @property
    def training_operator(self) -> Process:
        """The training-operator; it exists once the API server has given it a token."""
        assert self._training_operator is not None
        return self._training_operator

    def start_api_server(self) -> None:
        self._etcd.start()
        self._api_server.start()

    def wait_for_api_server(self, api: Api) -> None:
        def ready() -> bool:
            self._etcd.check()
            self._api_server.check()
            return api.is_ready()

        wait_until(ready, "the API server to be ready", START_TIMEOUT_SECONDS)

    def start_controllers(self, training_operator_kubeconfig: Path) -> None:
        _WEBHOOK_MARKER.parent.mkdir(parents=True, exist_ok=True)
        _WEBHOOK_MARKER.touch()
        self._training_operator = Process(
            "training-operator",
            [binaries.ensure("training-operator"), *self._training_operator_flags(training_operator_kubeconfig)],
            self._folder / "training-operator.log",
            {"TMPDIR": str(self._folder), "MY_POD_NAMESPACE": TRAINING_OPERATOR_NAMESPACE},
        )
        self._manager.start()
        self._training_operator.start()

    def wait_for_controllers(self) -> None:
        self._wait_for_controller_manager()
        self.wait_for_training_operator()

    def wait_for_training_operator(self) -> None:
        self._wait_healthy(self.training_operator, f"http://127.0.0.1:{self._probe_port}/readyz")
        # Ready means that the webhook listens; the controller itself is set up a moment later.
        wait_until(
            lambda: self.training_operator.has_said('Starting workers\t{"controller": "pytorchjob-controller"'),
            "the training-operator to reconcile",
            START_TIMEOUT_SECONDS,
        )

    def restart_controller_manager(self) -> None:
        self._manager.stop()
        self._manager.start()
        self._wait_for_controller_manager()

    def stop(self) -> None:
        # The clients first, so that no log ends in a heap of refused connections.
        for process in (self._training_operator, self._manager, self._api_server, self._etcd):
            if process is not None:
                process.stop()

    def webhook_secret(self) -> Resource:
        pairs = {
            "ca.crt": self._webhook_authority.pair.certificate,
            "ca.key": self._webhook_authority.pair.key,
            "tls.crt": self._webhook_server.certificate,
            "tls.key": self._webhook_server.key,
        }
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": _WEBHOOK_SECRET},
            "stringData": {name: pem.decode() for name, pem in pairs.items()},
        }

    def webhook_configuration(self) -> Resource:
        return webhook_configuration(
            WEBHOOK_CONFIGURATION,
            f"https://127.0.0.1:{self._webhook_port}{WEBHOOK_PATH}",
            ca_bundle=self._webhook_authority.pair.certificate,
        )

    def _wait_for_controller_manager(self) -> None:
        self._wait_healthy(self._manager, f"https://127.0.0.1:{self._manager_port}/healthz")

    def _wait_healthy(self, process: Process, url: str) -> None:
        def healthy() -> bool:
            process.check()
            return _answers(url, self._folder / "ca.crt")

        wait_until(healthy, f"{process.name} to be healthy", START_TIMEOUT_SECONDS)

    def _process(self, name: str, flags: Mapping[str, object], environment: Mapping[str, str] | None = None) -> Process:
        command = [str(binaries.ensure(name)), *(f"--{flag}={value}" for flag, value in flags.items())]
        return Process(name, command, self._folder / f"{name}.log", environment)

    def _write_files(self) -> None:
        folder = self._folder
        self._authority.pair.write(folder, "ca")
        self._authority.server("kubernetes.default.svc", *self._addresses()).write(folder, "server")
        (folder / "tokens.key").write_bytes(signing_key())
        (folder / "audit-policy.yaml").write_text(json.dumps(_AUDIT_POLICY))
        webhook_folder = folder / "k8s-webhook-server" / "serving-certs"
        webhook_folder.mkdir(parents=True)
        self._webhook_server.write(webhook_folder, "tls")
        self._write_client("admin", "kubernetes-admin", "system:masters")
        self._write_client("controller-manager", "system:kube-controller-manager")

    def _addresses(self) -> tuple[str, ...]:
        """Addresses of the API server besides loopback; the first is where it is found."""
        return ("127.0.0.1", "10.96.0.1")

    def _write_client(self, name: str, user: str, *groups: str) -> None:
        certificate, key = self._authority.client(user, *groups).write(self._folder, name)
        cluster = {
            "server": f"https://{self._addresses()[0]}:{self._api_port}",
            "certificate-authority": str(self._folder / "ca.crt"),
        }
        credentials = {"client-certificate": str(certificate), "client-key": str(key)}
        write_kubeconfig(self._folder / f"{name}.kubeconfig", cluster, credentials, "default")

    def _etcd_flags(self) -> dict[str, object]:
        peer_url = f"http://127.0.0.1:{self._etcd_peer_port}"
        client_url = f"http://127.0.0.1:{self._etcd_port}"
        return {
            "data-dir": self._folder / "etcd",
            "listen-client-urls": client_url,
            "advertise-client-urls": client_url,
            "listen-peer-urls": peer_url,
            "initial-advertise-peer-urls": peer_url,
            "initial-cluster": f"default={peer_url}",
            "unsafe-no-fsync": "true",
            "quota-backend-bytes": 4 * 1024**3,
            "log-level": "warn",
        }

    def _api_server_flags(self) -> dict[str, object]:
        folder = self._folder
        return {
            "etcd-servers": f"http://127.0.0.1:{self._etcd_port}",
            "bind-address": "127.0.0.1",
            "secure-port": self._api_port,
            # An Endpoints object may not name loopback, and nobody here looks the API server up.
            "endpoint-reconciler-type": "none",
            "service-cluster-ip-range": "10.96.0.0/16",
            "tls-cert-file": folder / "server.crt",
            "tls-private-key-file": folder / "server.key",
            "client-ca-file": folder / "ca.crt",
            "authorization-mode": "Node,RBAC",
            "enable-admission-plugins": "NodeRestriction",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": folder / "tokens.key",
            "service-account-signing-key-file": folder / "tokens.key",
            "audit-log-path": folder / "audit.log",
            "audit-policy-file": folder / "audit-policy.yaml",
        }

    def _manager_flags(self) -> dict[str, object]:
        kubeconfig = self._folder / "controller-manager.kubeconfig"
        return {
            "kubeconfig": kubeconfig,
            "authentication-kubeconfig": kubeconfig,
            "authorization-kubeconfig": kubeconfig,
            "bind-address": "127.0.0.1",
            "secure-port": self._manager_port,
            "tls-cert-file": self._folder / "server.crt",
            "tls-private-key-file": self._folder / "server.key",
            "leader-elect": "false",
            "controllers": ",".join(CONTROLLERS),
            "use-service-account-credentials": "true",
            "service-account-private-key-file": self._folder / "tokens.key",
            "root-ca-file": self._folder / "ca.crt",
            "pvclaimbinder-sync-period": "1s",
            "kube-api-qps": 500,
            "kube-api-burst": 1000,
        }

    def _training_operator_flags(self, kubeconfig: Path) -> list[str]:
        return [
            f"--kubeconfig={kubeconfig}",
            "--enable-scheme=pytorchjob",
            f"--webhook-server-port={self._webhook_port}",
            f"--health-probe-bind-address=127.0.0.1:{self._probe_port}",
            "--metrics-bind-address=0",
            # Tests that wait for the default 20 requests per second would measure only that.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--controller-threads=4",
        ]


def webhook_configuration(
    name: str, url: str, *, ca_bundle: bytes | None, namespace_selector: Resource | None = None
) -> Resource:
    """Return the training-operator's registration with an address on loopback instead of a Service."""
    client: Resource = {"url": url}
    if ca_bundle is not None:
        client["caBundle"] = base64.b64encode(ca_bundle).decode()
    webhook: Resource = {
        "name": "validator.pytorchjob.training-operator.kubeflow.org",
        "admissionReviewVersions": ["v1"],
        "clientConfig": client,
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "rules": [
            {
                "apiGroups": ["kubeflow.org"],
                "apiVersions": ["v1"],
                "operations": ["CREATE", "UPDATE"],
                "resources": ["pytorchjobs"],
            }
        ],
    }
    if namespace_selector is not None:
        webhook["namespaceSelector"] = namespace_selector
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [webhook],
    }


def write_kubeconfig(path: Path, cluster: Resource, user: Resource, namespace: str) -> None:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
        "current-context": "test",
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))


def _answers(url: str, ca_file: Path) -> bool:
    try:
        pool = urllib3.PoolManager(ca_certs=str(ca_file), retries=False)
        return pool.request("GET", url, timeout=2).status == 200
    except urllib3.exceptions.HTTPError:
        return False
