"""Our operator as many short-lived processes: forked from one that has imported everything, each behind a proxy of
its own, killed for real.
"""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType

from .control_plane import ControlPlane
from .fault_proxy import FaultProxy, Loop, Plan, trusting
from .forking import fork_operator
from .helm import Helm
from .operator import ACCOUNT

_IMPATIENT = {"BASE_SECONDS": 0.1, "CAP_SECONDS": 0.5, "RELIST_SECONDS": 1.0}


class Life:
    """One operator process and its proxy."""

    def __init__(self, proxy: FaultProxy, process: ForkServerProcess, log: Path) -> None:
        self.proxy, self.log, self._process = proxy, log, process

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def end(self) -> None:
        """Kill it if it lives, and let nothing of it through."""
        self._process.kill()
        self._process.join()
        self.proxy.stop()


@dataclass
class Nursery:
    """Starts operators under the rights that the chart gives a cluster-wide one; use it in a `with` block."""

    control_plane: ControlPlane
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Nursery:
        # With the control plane's logs, and as long as they.
        self.folder = Path(tempfile.mkdtemp(prefix="forked-", dir=self.control_plane.folder))
        self.ops = self.control_plane.create_namespace("ops")
        values = {"namespaces": [], "crd": {"install": False}, "rbac": {"aggregate": False, "protectReports": "never"}}
        Helm(self.folder, self.control_plane.kubeconfig).install(self.ops, values)
        # Each life has a Lease of its own name: a killed one cannot work on, so that nothing has to wait for its end.
        self.control_plane.apply(_any_lease(), self.ops)
        self._tls = trusting(self.control_plane.kubeconfig)
        self._serial = itertools.count(1)
        self._lives: list[Life] = []
        self.loop = Loop().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for life in self._lives:
            life.end()
        self.loop.__exit__(None, None, None)
        self.control_plane.delete_namespace(self.ops)

    def start(self, namespace: str, plan: Plan, *, lease: str = "", tuned: Mapping[str, float] | None = None) -> Life:
        """Start an operator for one namespace, whose requests the plan is asked about; `tuned`: see `fork_operator`."""
        proxy = FaultProxy(self.loop, self.control_plane.server, self._tls, plan).start()
        number = next(self._serial)
        log = self.folder / f"{namespace}.log"
        kubeconfig = self.control_plane.kubeconfig_for(ACCOUNT, self.ops, proxy.url)
        environment = {
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_NAMESPACES": namespace,
            "FINETUNE_TRAINER_IMAGE": "trainer.example/trainer@sha256:" + "0" * 64,
            "FINETUNE_LEASE_NAME": lease or f"life-{number}",
            "FINETUNE_LEASE_NAMESPACE": self.ops,
            # Nobody restarts an operator that ends because a busy machine kept it from renewing its Lease.
            "FINETUNE_LEASE_SECONDS": "120",
            "FINETUNE_HEALTH_PORT": "0",
            "FINETUNE_METRICS_PORT": "0",
            "FINETUNE_BACKOFF_BASE_SECONDS": "0.1",
            "FINETUNE_GRACE_SECONDS": "1",
            **self.environment,
        }
        process = fork_operator(environment, log, _IMPATIENT | dict(tuned or {}))
        pid = process.pid
        assert pid is not None
        proxy.on_kill = lambda: os.kill(pid, signal.SIGKILL)
        life = Life(proxy, process, log)
        self._lives.append(life)
        return life


def _any_lease() -> list[dict[str, object]]:
    rule = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "any-lease"}
    kinds = {"Role": {"rules": [rule]}}
    kinds["RoleBinding"] = {"roleRef": role, "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT}]}  # type: ignore[dict-item]
    return [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": "any-lease"}, **rest}
        for kind, rest in kinds.items()
    ]
