"""The process that keeps the cluster's programs running: `up` starts it apart from the terminal, `down` ends it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.integration.harness.api import Api, ApiError

from . import leftovers, machine
from .images import Images
from .node import NodeControlPlane, NodePrograms
from .places import Places

_POLL_SECONDS = 0.2
_KEPT_ON_START = ("sysctl.json", "supervisor.log")


class _Ended(BaseException):
    """SIGTERM came: whatever is under way is left."""


def serve(places: Places, owner: int | None = None) -> None:
    """Bring everything up, stay until SIGTERM or the end of the process `owner`, and take everything down again."""
    stop = threading.Event()

    def end(*_: object) -> None:
        if not stop.is_set():
            stop.set()
            raise _Ended

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with contextlib.suppress(_Ended), _alone(places):
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
            _stay(places, programs, owner)
        finally:
            stop.set()  # the clean-up is not left half way
            places.ready_file.unlink(missing_ok=True)
            _end(places, programs, plane)


def _start(places: Places, programs: NodePrograms, plane: NodeControlPlane) -> None:
    programs.start_containerd()
    leftovers.remove_containers(places)
    Images(places).bring()
    plane.start()
    programs.start_node(plane.api)
    _serve_class_of_volumes(plane.api)


def _stay(places: Places, programs: NodePrograms, owner: int | None) -> None:
    """Until the owner has ended; stop and start the kubelet as the tests say."""
    while owner is None or Path(f"/proc/{owner}").exists():
        away = places.kubelet_away_file.exists()
        if away and programs.kubelet.pid is not None:
            programs.kubelet.stop()
        elif not away and programs.kubelet.pid is None:
            programs.kubelet.start()
        time.sleep(_POLL_SECONDS)


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
    serve(Places(Path(sys.argv[1]), Path(sys.argv[2])), int(sys.argv[3]) if len(sys.argv) > 3 else None)
