"""What a machine needs to run pods, and what this one lacks, in one sentence."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from tests.integration.harness import binaries

PACKAGES = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "skopeo": "skopeo",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
}
"""Programs and the Debian packages that bring them."""
PLUGINS = Path("/usr/lib/cni")
PLUGINS_PACKAGE = "containernetworking-plugins"
DISK_GB, MEMORY_GB = 40, 6


def missing_packages() -> list[str]:
    """Debian packages that are not installed yet."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    wanted = {package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None}
    if not (PLUGINS / "bridge").exists():
        wanted.add(PLUGINS_PACKAGE)
    return sorted(wanted)


def lacks(cache: Path) -> str | None:
    """Why no node can run on this machine, in a sentence; None if one can."""
    if platform.system() != "Linux":
        return "A node that runs pods needs Linux."
    if os.geteuid() != 0:
        return "A node that runs pods needs root."
    packages = missing_packages()
    if packages and shutil.which("apt-get") is None:
        return f"A node that runs pods needs {', '.join(packages)}, and there is no apt-get to install them with."
    if binaries.missing((*binaries.CONTROL_PLANE, *binaries.NODE)) and not binaries.can_build():
        return binaries.HOW_TO_GET_THEM
    if not _can_mount():
        return "A node that runs pods has to mount file systems, which this machine refuses (a container itself?)."
    return _too_small(cache)


def install_packages() -> None:
    """Install what is missing with apt-get. Raises SystemExit with its last words."""
    packages = missing_packages()
    if not packages:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *words], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"`apt-get {' '.join(words)}` failed: {done.stderr.strip().splitlines()[-1]}")


def _can_mount() -> bool:
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return done.returncode == 0


def _too_small(cache: Path) -> str | None:
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    held = (cache / "containerd").exists()
    if free < (DISK_GB if not held else 5):
        return f"Building and running the images takes {DISK_GB} GB under {existing}, and {free:.0f} are free."
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if memory < MEMORY_GB:
        return f"Three training pods and a cluster take {MEMORY_GB} GB of memory, and this machine has {memory:.0f}."
    return None
