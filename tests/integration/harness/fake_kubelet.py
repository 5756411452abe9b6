"""What nodes would have done: binds pods, runs them, ends them, loses them - by writing their status.

It writes what a real kubelet, scheduler or eviction manager writes, and nothing else; whatever
follows from that is the doing of the real controllers. A pod that was bound and is deleted stays,
terminating, until `finish_termination`: the kubelet's part is never done behind a test's back,
except while `playing`.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .api import Api, ApiError, Resource
from .processes import wait_until

FAKE_NODE_LABEL = "finetune.dev/fake-node"
OUT_OF_SERVICE_TAINT = "node.kubernetes.io/out-of-service"
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Exit:
    """How a pod's containers end: exit code, termination message, and the kubelet's reason."""

    code: int = 0
    message: str = ""
    reason: str | None = None

    @classmethod
    def out_of_memory(cls) -> Exit:
        """Return the end of a container that the kernel killed for its memory limit."""
        return cls(code=137, reason="OOMKilled")


Script = Callable[[Resource], Exit | None]
"""Asked about each running pod until it answers how the pod ends; None means that it runs on."""


class FakeKubelet:
    """The kubelets of a cluster that has none."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self._addresses = itertools.count(1)

    # Nodes

    def add_node(self, name: str = "node-a", *, gpus: int = 8, labels: Mapping[str, str] | None = None) -> Resource:
        """Create a node that is ready, or bring the lost one of that name back."""
        manifest = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {FAKE_NODE_LABEL: "true", **(labels or {})}},
        }
        node = self.api.find("Node", name) or self.api.create(manifest)
        self.api.patch(node, {"spec": {"taints": None}})
        capacity = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": str(gpus)}
        node = self._set_node_ready(name, "True", "KubeletReady")
        return self.api.patch(node, {"status": {"capacity": capacity, "allocatable": capacity}}, "status")

    def lose_node(self, name: str) -> None:
        """Let a node fall silent: unreachable, its pods not ready and, toleration over, deleted.

        Nobody ends these pods: they terminate until the node comes back (`finish_termination`) or
        is declared `out_of_service`.
        """
        node = self._set_node_ready(name, "Unknown", "NodeStatusUnknown")
        effects = ("NoSchedule", "NoExecute")
        self._taint(node, [{"key": "node.kubernetes.io/unreachable", "effect": effect} for effect in effects])
        for pod in self.pods_on(name):
            self._set_conditions(pod, _condition("Ready", "False", "NodeNotReady"))
            self._disrupt(pod, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")

    def declare_out_of_service(self, name: str) -> None:
        """Let an administrator declare a lost node dead, and nothing more: its terminating pods are still there."""
        self._taint(
            self.api.get("Node", name),
            [{"key": OUT_OF_SERVICE_TAINT, "value": "nodeshutdown", "effect": "NoExecute"}],
        )

    def out_of_service(self, name: str) -> None:
        """Let an administrator declare a lost node dead; the pod collector lets its terminating pods go away."""
        self.declare_out_of_service(name)
        for pod in self.pods_on(name):
            self.api.delete(pod, grace_seconds=0)

    def pods_on(self, node: str) -> list[Resource]:
        """Return the pods bound to a node, of all namespaces."""
        return [pod for pod in self.api.objects("Pod") if pod["spec"].get("nodeName") == node]

    # Pods, in the order of their lives

    def wait_for_pods(self, namespace: str, count: int, labels: Mapping[str, str] | None = None) -> list[Resource]:
        """Wait until that many pods exist that are not being deleted, and return them by name."""

        def present() -> list[Resource] | None:
            pods = self.api.objects("Pod", namespace, labels)
            living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
            return living if len(living) == count else None

        return wait_until(present, f"{count} pods with labels {dict(labels or {})} in {namespace}")

    def unschedulable(
        self, pod: Resource, message: str = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    ) -> Resource:
        """Let the scheduler say that the pod fits nowhere."""
        return self._set_conditions(pod, _condition("PodScheduled", "False", "Unschedulable", message))

    def bind(self, pod: Resource, node: str = "node-a") -> Resource:
        """Let the scheduler place the pod; from here on only its kubelet can end its deletion."""
        metadata = pod["metadata"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        self.api.request("POST", self.api.path_of(pod, "binding"), binding)
        return self.waiting(pod, "ContainerCreating")

    def waiting(self, pod: Resource, reason: str, message: str = "") -> Resource:
        """Let the containers wait: `ContainerCreating`, `ImagePullBackOff`, `CreateContainerConfigError`, ..."""
        state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}
        return self._set_status(pod, {"phase": "Pending", **_containers(pod, state, ready=False)}, ready=False)

    def run(self, pod: Resource, node: str = "node-a") -> Resource:
        """Let all containers of the pod run, binding it first where that has not happened."""
        pod = self._present(pod)
        if not pod["spec"].get("nodeName"):
            pod = self.bind(pod, node)
        now = _now()
        address = self._address()
        status = {"phase": "Running", "startTime": now, "podIP": address, "podIPs": [{"ip": address}]}
        containers = _containers(pod, {"running": {"startedAt": now}}, ready=True)
        return self._set_status(pod, {**status, **containers}, ready=True)

    def end(self, pod: Resource, exit: Exit | None = None) -> Resource:
        """Let all containers of a running pod end, and with them the pod."""
        exit = exit or Exit()
        pod = self._present(pod)
        terminated = {
            "exitCode": exit.code,
            "reason": exit.reason or ("Completed" if exit.code == 0 else "Error"),
            "startedAt": pod["status"].get("startTime", _now()),
            "finishedAt": _now(),
            **({"message": exit.message} if exit.message else {}),
        }
        status = {"phase": "Succeeded" if exit.code == 0 else "Failed"}
        return self._set_status(
            pod, {**status, **_containers(pod, {"terminated": terminated}, ready=False)}, ready=False
        )

    def evict(self, pod: Resource, message: str = "The node was low on resource: memory.") -> Resource:
        """Let the kubelet evict the pod under node pressure: failed, with the reason on the pod."""
        pod = self._set_conditions(pod, _condition("DisruptionTarget", "True", "TerminationByKubelet", message))
        pod = self.end(pod, Exit(code=137))
        return self.api.patch(pod, {"status": {"reason": "Evicted", "message": message}}, "status")

    def preempt(self, pod: Resource) -> None:
        """Let the scheduler preempt the pod: marked and deleted, running on through its grace period."""
        self._disrupt(pod, "PreemptionByScheduler", "preempting to accommodate a higher priority pod")

    def finish_termination(self, pod: Resource, exit: Exit | None = None) -> None:
        """Let the kubelet end a pod that is being deleted; without an exit, as if it heeded SIGTERM.

        One that is gone already needs nothing. Does nothing about finalizers: those are their controllers' to remove.
        """
        present = self.api.refresh(pod)
        if present is None:
            return
        pod = present
        if "deletionTimestamp" not in pod["metadata"]:
            raise AssertionError(f"Pod {pod['metadata']['name']} is not being deleted.")
        if pod["status"].get("phase") not in ("Succeeded", "Failed"):
            pod = self.end(pod, exit or Exit(code=143))
        self.api.delete(pod, grace_seconds=0)

    # Many pods at once

    @contextlib.contextmanager
    def playing(self, namespace: str, script: Script | None = None, node: str = "node-a") -> Iterator[None]:
        """Run every pod of a namespace in the background: bind, run, and end as the script says.

        Without a script, pods succeed at once. Deleted pods end at once. An error in the script
        is raised when the block ends.
        """
        stop = threading.Event()
        errors: list[BaseException] = []

        def play() -> None:
            try:
                # Asks again rather than watches: nothing is missed, and scripts may change their mind with time.
                while not stop.wait(_POLL_SECONDS):
                    for pod in self.api.objects("Pod", namespace):
                        self._play(pod, script or (lambda _: Exit()), node)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=play, name=f"fake-kubelet-{namespace}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if errors:
                # Also when the block failed: that it waited in vain is then only the consequence.
                raise errors[0]

    def _play(self, pod: Resource, script: Script, node: str) -> None:
        phase = pod["status"].get("phase", "Pending")
        try:
            if "deletionTimestamp" in pod["metadata"]:
                self.finish_termination(pod)
            elif phase == "Pending":
                self.run(pod, node)
            elif phase == "Running" and (exit := script(pod)) is not None:
                self.end(pod, exit)
        except ApiError as error:
            # The pod went away, or another came under its name, between the list and this.
            if error.code not in (404, 409):
                raise

    # Volumes

    def bind_claim(self, claim: Resource, path: str = "/var/empty") -> Resource:
        """Provision a volume for a pending claim; the real binder then binds them."""
        metadata, spec = claim["metadata"], claim["spec"]
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"volume-{metadata['uid']}"},
            "spec": {
                "accessModes": spec["accessModes"],
                "capacity": {"storage": spec["resources"]["requests"]["storage"]},
                "storageClassName": spec.get("storageClassName", ""),
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": path},
                "claimRef": {
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                    "namespace": metadata["namespace"],
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                },
            },
        }
        self.api.create(volume)

        def bound() -> Resource | None:
            present = self.api.refresh(claim)
            return present if present and present["status"].get("phase") == "Bound" else None

        return wait_until(bound, f"claim {metadata['name']} to be bound")

    # Writing

    def _present(self, pod: Resource) -> Resource:
        present = self.api.refresh(pod)
        if present is None:
            raise ApiError("GET", self.api.path_of(pod), 404, {"message": "this pod is gone, or was replaced"})
        return present

    def _disrupt(self, pod: Resource, reason: str, message: str) -> None:
        self._set_conditions(pod, _condition("DisruptionTarget", "True", reason, message))
        self.api.delete(pod)

    def _set_status(self, pod: Resource, status: Resource, *, ready: bool) -> Resource:
        word = "True" if ready else "False"
        conditions = [
            _condition("PodScheduled", "True"),
            _condition("Initialized", "True"),
            _condition("Ready", word),
            _condition("ContainersReady", word),
        ]
        return self._set_conditions(pod, *conditions, status=status)

    def _set_conditions(self, pod: Resource, *conditions: Resource, status: Resource | None = None) -> Resource:
        present = self._present(pod)
        merged = {condition["type"]: condition for condition in present["status"].get("conditions", [])}
        for condition in conditions:
            before = merged.get(condition["type"], {})
            if before.get("status") != condition["status"] or before.get("reason") != condition.get("reason"):
                merged[condition["type"]] = condition
        body = {
            # With the UID in it the API server refuses to write into another pod of the same name.
            "metadata": {"uid": present["metadata"]["uid"]},
            "status": {**(status or {}), "conditions": list(merged.values())},
        }
        return self.api.patch(present, body, "status")

    def _set_node_ready(self, name: str, status: str, reason: str) -> Resource:
        conditions = [_condition("Ready", status, reason)]
        node = {"kind": "Node", "metadata": {"name": name}}
        return self.api.patch(node, {"status": {"conditions": conditions}}, "status")

    def _taint(self, node: Resource, taints: list[Resource]) -> None:
        present = [*self.api.get("Node", node["metadata"]["name"])["spec"].get("taints", []), *taints]
        self.api.patch(node, {"spec": {"taints": present}})

    def _address(self) -> str:
        number = next(self._addresses)
        return f"10.244.{number // 250 % 250}.{number % 250 + 1}"


def succeed(_: Resource) -> Exit:
    """Let every pod succeed: the script for jobs of which only the end matters."""
    return Exit()


def run_forever(_: Resource) -> Exit | None:
    """Let every pod run until it is deleted."""
    return None


def _containers(pod: Resource, state: Resource, *, ready: bool) -> Resource:
    done = {"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": _now(), "finishedAt": _now()}}
    waits = "waiting" in state
    return {
        "initContainerStatuses": [
            _container(container, state if waits else done, ready=not waits)
            for container in pod["spec"].get("initContainers", [])
        ],
        "containerStatuses": [_container(container, state, ready=ready) for container in pod["spec"]["containers"]],
    }


def _container(container: Resource, state: Resource, *, ready: bool) -> Resource:
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "" if "waiting" in state else f"{container['image']}@sha256:{'0' * 64}",
        "ready": ready,
        "started": ready,
        "restartCount": 0,
        "state": state,
    }


def _condition(kind: str, status: str, reason: str | None = None, message: str = "") -> Resource:
    condition: Resource = {"type": kind, "status": status, "lastTransitionTime": _now()}
    if reason:
        condition["reason"] = reason
    if message:
        condition["message"] = message
    return condition


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
