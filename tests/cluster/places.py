"""Where the cluster keeps its things, and the addresses it uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.integration.harness import binaries

NODE_ADDRESS = "198.18.255.1"
"""The node, the API server and the tests' servers. On the loopback device, so that no other machine gets there."""
DNS_ADDRESS = "198.18.255.53"
SERVICE_RANGE = "198.18.0.0/17"
API_SERVICE_ADDRESS = "198.18.0.1"
POD_RANGE = "198.18.128.0/18"
"""All within a range that is set aside for tests of networks and so for nobody's real ones."""
NODE_NAME = "node"
CGROUP = "finetune-test"
BRIDGE = "finetune0"
NETWORK = "finetune-test"


@dataclass(frozen=True)
class Places:
    """One folder for everything that lives as long as the cluster, one for what is quick to have again."""

    state: Path
    cache: Path

    @classmethod
    def default(cls) -> Places:
        """Beside the built programs, outside any checkout."""
        base = binaries.cache_folder().parent
        given = os.environ.get("FINETUNE_TEST_CLUSTER")
        return cls(Path(given) if given else base / "cluster", base / "containers")

    @property
    def kubeconfig(self) -> Path:
        """For kubectl, as administrator."""
        return self.state / "admin.kubeconfig"

    @property
    def pid_file(self) -> Path:
        """Holds the supervisor's process id while it lives."""
        return self.state / "supervisor.pid"

    @property
    def ready_file(self) -> Path:
        """Exists once pods can run."""
        return self.state / "ready"

    @property
    def kubelet_away_file(self) -> Path:
        """While it exists, the kubelet is stopped."""
        return self.state / "kubelet-away"

    @property
    def socket(self) -> Path:
        """Where containerd listens."""
        return self.state / "containerd.sock"

    @property
    def volumes(self) -> Path:
        """Folders behind the tests' volumes."""
        return self.state / "volumes"
