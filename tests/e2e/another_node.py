"""A second node that is only heard of: a cluster all of whose nodes are silent gives up no pods."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from types import TracebackType

from tests.integration.harness.api import Api, Resource

NAME = "elsewhere"
_LEASES = "kube-node-lease"
_RENEW_SECONDS = 5


class AnotherNode:
    """Says every few seconds that it is there, takes no pods, and is forgotten at the end."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._node: Resource = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME}}
        self._lease: Resource = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": NAME, "namespace": _LEASES},
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> AnotherNode:
        self.__exit__(None, None, None)  # one that a killed run has left
        self._stop.clear()
        self._api.create(self._node | {"spec": {"unschedulable": True}})
        self._api.create(self._lease | {"spec": {"holderIdentity": NAME, "leaseDurationSeconds": 40} | _renewed()})
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "played by a test"}
        ready |= {"lastHeartbeatTime": now, "lastTransitionTime": now}
        self._api.patch(self._node, {"status": {"conditions": [ready]}}, "status")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(30)
        self._api.delete(self._lease)
        self._api.delete(self._node)

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS):
            self._api.patch(self._lease, {"spec": _renewed()})


def _renewed() -> Resource:
    return {"renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
