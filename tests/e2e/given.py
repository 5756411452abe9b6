"""A cluster that exists already: what it must have, a pod that reads its volumes, and what is taken away again."""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes
import urllib3
import yaml
from tests.cluster.images import names
from tests.integration.harness.api import ApiError, Resource
from tests.integration.harness.processes import TimedOutError, wait_until

from finetune_api.base import GROUP, PLURAL
from finetune_operator.manifests.pod import USER

from .clusters import CACHE_CLAIM, OF_TESTS, RUN_CLAIM, Cluster

SYSTEM = "finetune-system"
CRD = f"{PLURAL}.{GROUP}"
TRAINING_OPERATOR = (
    "kubectl apply --server-side "
    '-k "github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.9.4"'
)
READER, TRIAL, VOLUME = "reader", "trial", "/volume"
PLACED_SECONDS, RUN_SECONDS = 180, 1800
"""For a volume to be made; for a pod of the trainer's image, which may have to be pulled, to end."""
NO_IMAGE = ("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_TRY = f"""
import pathlib, socket, sys
host, port = sys.argv[1:]
try:
    pathlib.Path("{VOLUME}/tried").touch()
except OSError as error:
    sys.exit(f"cannot write to the volume of its claim as user {USER}, group {USER}: {{error}}; see docs/storage.md")
try:
    socket.create_connection((host, int(port)), 20)
except OSError as error:
    sys.exit(f"cannot reach this machine as {{host}} ({{error}}): name an address that it can with --host-address")
"""


class GivenCluster(Cluster):
    """Volumes are of a StorageClass, and read by a pod; the release and its CRD go when the tests end."""

    owned = False

    def __init__(self, kubeconfig: Path, storage_class: str | None, address: str | None, prefix: str) -> None:
        self.kubeconfig, self.images = kubeconfig, names(prefix)
        self._class, self._mode, self.address = storage_class or "", "", address or ""
        self._built: dict[str, str] = {}
        self._reading: set[str] = set()

    def start(self) -> None:
        """Look whether it has what the tests need, and run one pod as they will."""
        try:
            self._look()
            self._try()
        except urllib3.exceptions.HTTPError as error:
            raise SystemExit(f"the API server that {self.kubeconfig} names cannot be reached: {error}") from error
        except ApiError as error:
            raise SystemExit(f"it refuses what the tests need: {error}") from error

    def leave(self) -> None:
        """Nothing: the trial is over, and the release goes with its fixture."""

    def _look(self) -> None:
        if not self.kubeconfig.is_file():
            raise SystemExit(f"there is no file {self.kubeconfig}.")
        try:
            api = self.api
        except (kubernetes.config.ConfigException, yaml.YAMLError, TypeError, AttributeError, ValueError) as error:
            words = " ".join(str(error).split())
            raise SystemExit(f"{self.kubeconfig} is no kubeconfig that can be used: {words}") from error
        if api.find("CustomResourceDefinition", "pytorchjobs.kubeflow.org") is None:
            raise SystemExit(
                f"it has no CRD pytorchjobs.kubeflow.org. Install the training-operator: {TRAINING_OPERATOR}"
            )
        system = api.find("Namespace", SYSTEM)
        marked = system is not None and OF_TESTS.items() <= system["metadata"].get("labels", {}).items()
        if not marked and (system or api.find("CustomResourceDefinition", CRD)):
            raise SystemExit(
                "finetune-operator is installed there, and these tests install, upgrade and remove it: "
                f"name another cluster (or remove the namespace {SYSTEM} and the CRD {CRD}, and with it all jobs)."
            )
        nodes = taking_pods(api.objects("Node"))
        self.node = nodes[0]["metadata"]["name"]
        self._class = storage_class(api.objects("StorageClass"), self._class)
        self._mode = "ReadWriteOnce" if len(nodes) == 1 else "ReadWriteMany"
        # Several nodes refuse to have a ReadWriteOnce claim made for them; one that is there they take.
        made = {"size": "1Gi", "storageClassName": self._class, "accessMode": self._mode}
        self.storage = {"claimName": RUN_CLAIM} if len(nodes) == 1 else made
        self.address = self.address or address_towards(nodes[0])

    def _try(self) -> None:
        """Run one pod: what hinders it is said once and now, and not by every test after minutes."""
        print(f"trying the given cluster: class {self._class}, {self._mode}, {self.address} ...", file=sys.stderr)
        with listening(self.address) as port:
            made = self.namespace(f"e2e-trial-{secrets.token_hex(2)}")
            name = made["metadata"]["name"]
            try:
                self.claim(name, "trial", self._class, self._mode)
                first = self._container("operator", ["python", "-c", ""])
                second = self._container("trainer", ["python", "-c", _TRY, self.address, str(port)], VOLUME)
                self.api.create(pod(TRIAL, "trial", second, before=[first]), name)
                self._await_trial(name)
            finally:
                self.api.delete(made)

    def _await_trial(self, namespace: str) -> None:
        said: list[str] = []

        def seen() -> Resource:
            events = self.api.request("GET", f"/api/v1/namespaces/{namespace}/events")["items"]
            said[:] = [event["message"] for event in events]
            found = self.api.get("Pod", TRIAL, namespace)
            why = hindrance(found, events, self._class, self._mode)
            if why:
                raise SystemExit(why)
            return found

        try:
            wait_until(lambda: "nodeName" in seen()["spec"], "a node and a volume", PLACED_SECONDS)
            wait_until(lambda: seen()["status"]["phase"] == "Succeeded", "the trial to end", RUN_SECONDS)
        except TimedOutError as error:
            wanted = f"a pod with a {self._mode} volume of class {self._class}"
            raise SystemExit(f"{wanted} does not come to run there. Its events: {' '.join(said)}") from error
        status = seen()["status"]
        self._built["operator"] = status["initContainerStatuses"][0]["imageID"]
        self._built["trainer"] = status["containerStatuses"][0]["imageID"]

    def _container(self, image: str, command: list[str], volume: str | None = None) -> Resource:
        return {
            "name": image,
            "image": self.images[image],
            "command": command,
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "run", "mountPath": volume}] if volume else [],
        }

    def built(self, image: str) -> str:
        """The image's id, as the trial saw it."""
        return self._built[image]

    def furnish(self, namespace: str) -> None:
        """Claims, and a pod that reads the run volume: it waits for a claim that the operator makes."""
        self.claim(namespace, CACHE_CLAIM, self._class, self._mode)
        if "claimName" in self.storage:
            self.claim(namespace, RUN_CLAIM, self._class, self._mode)
        reader = self._container("trainer", ["sleep", "infinity"], VOLUME)
        reader["volumeMounts"][0]["readOnly"] = True
        self.api.create(pod(READER, RUN_CLAIM, reader), namespace)

    def read(self, namespace: str, path: str) -> str:
        """By `cat` in the reader."""
        return self._in_reader(namespace, '[ ! -f "$0" ] || cat "$0"', path)

    def files(self, namespace: str, folder: str) -> list[str]:
        """By `ls` in the reader."""
        return self._in_reader(namespace, '[ ! -d "$0" ] || ls "$0"', folder).splitlines()

    def _in_reader(self, namespace: str, script: str, path: str) -> str:
        if namespace not in self._reading:

            def runs() -> bool:
                return bool(self.api.get("Pod", READER, namespace)["status"]["phase"] == "Running")

            wait_until(runs, f"the pod {READER}, which reads the volume, to run", PLACED_SECONDS)
            self._reading.add(namespace)
        return self.kubectl(namespace, "exec", READER, "--", "sh", "-c", script, f"{VOLUME}/{path}")

    def keep(self, namespace: str, folder: Path) -> None:
        """By `kubectl cp`, if the reader has ever run."""
        if namespace in self._reading:
            self.kubectl(namespace, "cp", f"{READER}:{VOLUME}", str(folder), seconds=300)

    def forget(self, namespace: str) -> None:
        """Volumes go with their claims, as their class says."""


def pod(name: str, claim: str, container: Resource, before: list[Resource] | None = None) -> Resource:
    """A pod that `restricted` lets in, with a claim as the volume `run`."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": before or [],
            "containers": [container],
            "volumes": [{"name": "run", "persistentVolumeClaim": {"claimName": claim}}],
        },
    }


def taking_pods(nodes: list[Resource]) -> list[Resource]:
    """Nodes that are ready and take any pod. Raises SystemExit with a sentence if there is none."""

    def takes(node: Resource) -> bool:
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
        taints = [t for t in node["spec"].get("taints", []) if t["effect"] != "PreferNoSchedule"]
        return ready and not taints and not node["spec"].get("unschedulable")

    found = [node for node in nodes if takes(node)]
    if not found:
        raise SystemExit("it has no node that is ready and takes pods without a toleration.")
    return found


def storage_class(classes: list[Resource], wanted: str) -> str:
    """The class that is wanted, or the default one. Raises SystemExit with a sentence if it is not there."""
    known = [found["metadata"]["name"] for found in classes]
    if wanted and wanted not in known:
        raise SystemExit(f"it has no StorageClass {wanted} (--storage-class); there are: {', '.join(known) or 'none'}.")
    mark = "storageclass.kubernetes.io/is-default-class"
    default = [c["metadata"]["name"] for c in classes if c["metadata"].get("annotations", {}).get(mark) == "true"]
    if not (wanted or default):
        raise SystemExit(
            f"no StorageClass is its default: name one with --storage-class; there are: {', '.join(known) or 'none'}."
        )
    return wanted or default[0]


def address_towards(node: Resource) -> str:
    """This machine's address on the route to a node, which is how pods mostly reach it; no packet is sent."""
    addresses = [a["address"] for a in node["status"].get("addresses", []) if a["type"] == "InternalIP"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((next(address for address in addresses if "." in address), 9))
        except (StopIteration, OSError):
            raise SystemExit(
                "no address of this machine is known that its pods reach: name one with --host-address."
            ) from None
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def listening(address: str) -> Iterator[int]:
    """A port of this machine on which somebody listens. Raises SystemExit where the address is not this machine's."""
    try:
        server = socket.create_server((address, 0))
    except OSError as error:
        raise SystemExit(f"{address} (--host-address) is no address of this machine: {error}") from error
    with server:
        yield server.getsockname()[1]


def hindrance(trial: Resource, events: list[Resource], storage_class: str, mode: str) -> str | None:
    """Why a pod that was tried will not end well, in a sentence; None while it may."""
    for event in events:
        if event["reason"] == "ProvisioningFailed":
            single = ", or a cluster of one node" if mode == "ReadWriteMany" else ""
            return (
                f"StorageClass {storage_class} gives no {mode} volume ({event['message'].strip().rstrip('.')}): "
                f"name another class with --storage-class{single}."
            )
    status = trial["status"]
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting, ended = (container.get("state", {}).get(state, {}) for state in ("waiting", "terminated"))
        if waiting.get("reason") in NO_IMAGE:
            return (
                f"it does not get the image {container['image']} ({waiting.get('message', waiting['reason'])}): "
                "build it (make images), push it where the nodes pull, or load it into them, and say what is before "
                "its name with --image-prefix."
            )
        if ended.get("exitCode"):
            words = (ended.get("message") or f"{ended.get('reason')}, exit code {ended['exitCode']}").strip()
            return f"a pod of {container['image']} {words.splitlines()[-1]}."
    if status.get("phase") == "Failed":
        return f"a pod fails there: {status.get('message') or status.get('reason')}."
    return None
