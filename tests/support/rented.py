"""Machines as they are rented without Kubernetes: RunPod's variables, on loopback or in network namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


def runpod_variables(index: int, count: int, port: int, primary: str = "127.0.0.1", own: str = "") -> dict[str, str]:
    """What an Instant Cluster sets on machine `index` of `count`, with one process a machine."""
    return {
        "PRIMARY_ADDR": primary,
        "MASTER_ADDR": primary,
        "PRIMARY_PORT": str(port),
        "MASTER_PORT": str(port),
        "NODE_ADDR": own or primary,
        "NODE_RANK": str(index),
        "NUM_NODES": str(count),
        "NUM_TRAINERS": "1",
        "HOST_NODE_ADDR": f"{primary}:{port}",
        "WORLD_SIZE": str(count),
    }


@dataclass(frozen=True)
class Namespace:
    """A machine with an address of its own and no other way out."""

    name: str
    address: str

    @property
    def enter(self) -> list[str]:
        """What to put before a command to run it there."""
        return ["ip", "netns", "exec", self.name]


def why_no_namespaces() -> str:
    """Why network namespaces cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need ip (Debian: iproute2)"
    name = f"ft{os.getpid()}p"
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _ip("netns", "delete", name, check=False)
    return ""


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    """So many machines on one bridge, which itself is in a namespace: this machine's network is left alone."""
    prefix = f"ft{os.getpid() % 100_000}"
    switch = f"{prefix}s"
    machines = [Namespace(f"{prefix}n{index}", f"198.18.7.{index + 2}") for index in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for index, machine in enumerate(machines):
            _ip("netns", "add", machine.name)
            _ip("-n", machine.name, "link", "set", "lo", "up")
            port = f"port{index}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "ens1", "netns", machine.name)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "ens1")
            _ip("-n", machine.name, "link", "set", "ens1", "up")
        yield machines
    finally:
        for name in (*(machine.name for machine in machines), switch):
            _ip("netns", "delete", name, check=False)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)
