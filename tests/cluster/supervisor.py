"""The process that keeps the cluster's programs running: `up` starts it apart from the terminal, `down` ends it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.integration.harness.api import Api, ApiError

from . import leftovers, machine
from .images import Images
from .node import NodeControlPlane, NodePrograms
from .places import Places

_KEPT_ON_START = ("sysctl.json", "supervisor.log")


def serve(places: Places) -> None:
    """Bring everything up, stay until SIGTERM, and take everything down again."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _alone(places):
        machine.install_packages()
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        leftovers.remove(places)
        if leftovers.another_node():
            raise SystemExit("This machine is a Kubernetes node already (iptables has KUBE- chains): use that cluster.")
        _empty(places.state)
        leftovers.prepare(places)
        programs = NodePrograms(places)
        plane = NodeControlPlane(programs)
        try:
            _start(places, programs, plane)
            places.ready_file.touch()
            stop.wait()
        finally:
            places.ready_file.unlink(missing_ok=True)
            _end(places, programs, plane)


def _start(places: Places, programs: NodePrograms, plane: NodeControlPlane) -> None:
    programs.start_containerd()
    leftovers.remove_containers(places)
    Images(places).bring()
    plane.start()
    programs.start_node(plane.api)
    _serve_class_of_volumes(plane.api)


def _serve_class_of_volumes(api: Api) -> None:
    """No class is the default: a claim is bound to a volume that names it."""
    with contextlib.suppress(ApiError):
        api.create(
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {"name": "local"},
                "provisioner": "kubernetes.io/no-provisioner",
                "volumeBindingMode": "Immediate",
            }
        )


def _end(places: Places, programs: NodePrograms, plane: NodeControlPlane) -> None:
    programs.stop_node()
    plane.stop()
    leftovers.remove_containers(places)
    programs.containerd.stop()
    leftovers.remove(places)


@contextlib.contextmanager
def _alone(places: Places) -> Iterator[None]:
    """One cluster a state folder; the kernel forgets the lock with the process."""
    with (places.state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"Another process keeps a cluster in {places.state} already.") from None
        places.pid_file.write_text(str(os.getpid()))
        try:
            yield
        finally:
            places.pid_file.unlink()


def _empty(folder: Path) -> None:
    """A cluster starts from nothing: what a former one wrote would only contradict it."""
    for path in folder.iterdir():
        if path.name in (*_KEPT_ON_START, "lock", "supervisor.pid"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


if __name__ == "__main__":
    serve(Places(Path(sys.argv[1]), Path(sys.argv[2])))
