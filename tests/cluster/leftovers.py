"""Remove what a node leaves on a machine: containers, mounts, addresses, the bridge, packet rules, control groups.

Works from what is there, not from what is remembered, so that it also cleans up after a killed cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from .node import ctr
from .places import BRIDGE, CGROUP, DNS_ADDRESS, NETWORK, NODE_ADDRESS, Places

SYSCTLS = (
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/ip_forward",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
"""What kubelet, kube-proxy and the bridge plugin change."""
_FOLDERS = (
    *(
        "/run/containerd/s",
        "/run/containerd/fifo",
        "/run/containerd/runc/k8s.io",
        "/run/containerd/runc",
        "/run/containerd",
    ),
    *("/var/lib/kubelet/device-plugins", "/var/lib/kubelet", "/var/log/containers"),
    *("/var/lib/cni/results", "/var/lib/cni/cache", "/var/lib/cni"),
)
"""Compiled into the programs; what is in them goes with the containers."""
_RULES = re.compile(r"^-A .*KUBE-|^-A .*name: \\?\"" + NETWORK)
_CHAINS = re.compile(r"^-N (KUBE-\S+)$", re.MULTILINE)
_TABLES = ("nat", "filter", "mangle")


def another_node() -> bool:
    """Whether this machine is a node of some cluster already, whose packet rules ours would disturb."""
    return any(_CHAINS.search(_iptables("-t", table, "-S")) for table in _TABLES)


def prepare(places: Places) -> None:
    """Note the machine's settings, and make addresses and control groups."""
    noted = _noted(places)
    if not noted.exists():  # else they are those from before a cluster that was killed
        paths = {name: Path("/proc/sys", name) for name in SYSCTLS}
        noted.write_text(json.dumps({name: path.read_text().strip() for name, path in paths.items() if path.exists()}))
    for address in (NODE_ADDRESS, DNS_ADDRESS):
        _run("ip", "address", "replace", f"{address}/32", "dev", "lo")
    for root in _hierarchies():
        group = root / CGROUP
        group.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):  # in cgroup v1 a new group has none
            if (group / name).exists() and not (group / name).read_text().strip():
                (group / name).write_text((root / name).read_text())
        for name, weight in (("cpu.shares", "6144"), ("cpu.weight", "600")):  # six busy processes, not one
            if (group / name).exists():
                (group / name).write_text(weight)


def remove_containers(places: Places) -> None:
    """End every process in our control groups and forget the containers; containerd has to answer."""
    _end_processes()
    for words in (("tasks", "ls", "-q"), ("containers", "ls", "-q")):
        for name in ctr(places, *words, check=False).stdout.split():
            verb = ("tasks", "rm", "--force") if words[0] == "tasks" else ("containers", "rm")
            ctr(places, *verb, name, check=False)


def remove(places: Places) -> None:
    """Remove everything that is not a file in a folder of ours; the programs have ended.

    Only where a cluster of ours was prepared: packet rules and some files have the names that every node gives them.
    """
    if not _noted(places).exists():
        return
    _end_processes()
    _end_shims(places)
    _unmount(places)
    _run("ip", "link", "delete", BRIDGE)
    for address in (NODE_ADDRESS, DNS_ADDRESS):
        _run("ip", "address", "delete", f"{address}/32", "dev", "lo")
    _remove_packet_rules()
    _remove_control_groups()
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(link.readlink()).startswith(str(places.state)):
            link.unlink()
    # Nobody else's: a machine that is a node of another cluster is refused.
    for pattern in (f"cni/results/{NETWORK}-*", "cni/results/cni-loopback-*", "kubelet/device-plugins/kubelet.sock"):
        for path in Path("/var/lib").glob(pattern):
            path.unlink()
    shutil.rmtree(places.state / "addresses", ignore_errors=True)
    for folder in _FOLDERS:
        with contextlib.suppress(OSError):  # only those that nobody else has put anything into
            Path(folder).rmdir()
    _restore_settings(places)


def _hierarchies() -> list[Path]:
    """Roots of the control groups: one of v2, several of v1."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root]
    return [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]


def _groups() -> Iterator[Path]:
    """Our control groups, the deepest first."""
    for root in _hierarchies():
        top = root / CGROUP
        if top.exists():
            yield from sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
            yield top


def _end_processes() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pids = {int(pid) for group in _groups() for pid in (group / "cgroup.procs").read_text().split()}
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _end_shims(places: Places) -> None:
    """The processes between containerd and containers outlive both; ours name our socket."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in words[0] and str(places.socket).encode() in words:
                os.kill(int(process.name), signal.SIGKILL)


def _unmount(places: Places) -> None:
    roots = (f"{places.state}/", f"{places.cache}/")
    points = [line.split()[1].replace("\\040", " ") for line in Path("/proc/mounts").read_text().splitlines()]
    for point in sorted((p for p in points if p.startswith(roots)), key=len, reverse=True):
        _run("umount", "--lazy", point)


def _remove_packet_rules() -> None:
    for table in _TABLES:
        lines = _iptables("-t", table, "-S").splitlines()
        for line in lines:
            if _RULES.match(line) and not line.startswith("-A KUBE-"):
                _run("sh", "-c", f"iptables -w -t {table} -D {line.removeprefix('-A ')}")
        chains = _CHAINS.findall("\n".join(lines))
        for flag in ("-F", "-X"):
            for chain in chains:
                _iptables("-t", table, flag, chain)


def _remove_control_groups() -> None:
    for group in _groups():
        with contextlib.suppress(OSError):
            group.rmdir()


def _noted(places: Places) -> Path:
    """The machine's settings from before; it exists while there is something to remove."""
    return places.state / "sysctl.json"


def _restore_settings(places: Places) -> None:
    for name, value in json.loads(_noted(places).read_text()).items():
        with contextlib.suppress(OSError):
            Path("/proc/sys", name).write_text(value)
    _noted(places).unlink()


def _iptables(*words: str) -> str:
    return subprocess.run(["iptables", "-w", *words], capture_output=True, text=True, check=False).stdout


def _run(*words: str) -> None:
    subprocess.run(words, capture_output=True, check=False)
