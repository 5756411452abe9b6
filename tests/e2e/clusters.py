"""What the tests ask of a cluster, and what the node of our own answers; `given` has the answers of any other."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TextIO

from tests.cluster.__main__ import down, running, up
from tests.cluster.images import Images, names
from tests.cluster.places import NODE_ADDRESS, NODE_NAME, Places
from tests.integration.harness.api import Api, Resource
from tests.integration.harness.processes import wait_until
from tests.support.time_limits import scaled

JOB = "days"
RUN_CLAIM, CACHE_CLAIM = f"{JOB}-run", "finetune-cache"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
OF_TESTS = {"finetune.dev/tests": "end-to-end"}
"""Marks what the tests have made: nothing else is ever removed."""
KEEP_VARIABLE = "FINETUNE_KEEP_CLUSTER"
"""Set it, and the cluster is still there for the next run."""
OTHERS_SECONDS = 20 * 60
"""How long another run of these tests on this machine is waited for: addresses and names are the same."""
_LEFT_OUT = shutil.ignore_patterns("*.distcp", "*.safetensors", "*.npy")


class Cluster(ABC):
    """A cluster that the tests use: its images, its volumes, and the way from its pods to the tests' servers."""

    owned: ClassVar[bool]
    """Whether it is a node of our own: its disk, its processes and its kubelet are within reach."""
    kubeconfig: Path
    address: str
    """This machine, as pods reach it."""
    node: str
    """One that takes pods."""
    images: Mapping[str, str]
    """What pods ask for, by `operator` and `trainer`."""
    storage: Resource
    """`storage.run` of the tests' jobs."""

    @cached_property
    def api(self) -> Api:
        """The API server, as the cluster's administrator."""
        return Api(self.kubeconfig)

    def kubectl(self, namespace: str, *words: str, given: str | None = None, seconds: float = 60) -> str:
        """Run kubectl; raises AssertionError with what it said."""
        program = Path(sys.executable).parent / "kubectl"
        command = [str(program), "--kubeconfig", str(self.kubeconfig), "-n", namespace, *words]
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, check=False, timeout=scaled(seconds)
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def namespace(self, name: str) -> Resource:
        """Make a namespace that enforces `restricted`, ready for pods."""
        metadata = {"name": name, "labels": RESTRICTED | OF_TESTS}
        made = self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        wait_until(lambda: self.api.find("ServiceAccount", "default", name), "the namespace")
        return made

    def claim(self, namespace: str, name: str, storage_class: str, mode: str) -> Resource:
        """Make a claim of the size that the tests need."""
        spec = {"storageClassName": storage_class, "accessModes": [mode]}
        spec |= {"resources": {"requests": {"storage": "1Gi"}}}
        made = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
        return self.api.create(made, namespace)

    @abstractmethod
    def start(self) -> None:
        """Make it usable. Raises SystemExit with a sentence that says why it cannot be, and what to do."""

    @abstractmethod
    def leave(self) -> None:
        """Undo what `start` has done, whether or not that came to an end."""

    @abstractmethod
    def built(self, image: str) -> str:
        """A name of what that image is: another one is another image."""

    @abstractmethod
    def furnish(self, namespace: str) -> None:
        """Make what the claims of one job need, and the claim of the cache."""

    @abstractmethod
    def read(self, namespace: str, path: str) -> str:
        """A file of the run volume; empty where there is none."""

    @abstractmethod
    def files(self, namespace: str, folder: str) -> list[str]:
        """The names in a folder of the run volume; none where there is no such folder."""

    @abstractmethod
    def keep(self, namespace: str, folder: Path) -> None:
        """Copy the run volume, but for large files if they can be told, into a new folder."""

    @abstractmethod
    def forget(self, namespace: str) -> None:
        """Remove the volumes of a namespace that has no pods any more."""


class OwnNode(Cluster):
    """The cluster of `tests.cluster`: volumes are folders of this machine."""

    owned = True

    def __init__(self, places: Places) -> None:
        self.places = places
        self.kubeconfig, self.address, self.node = places.kubeconfig, NODE_ADDRESS, NODE_NAME
        self.images = names()
        self.storage = {"size": "1Gi", "storageClassName": "local"}
        self._ours, self._lock = False, None

    def start(self) -> None:
        """Start it, or bring a running one the images of this checkout. One that we start ends with this process."""
        self._lock = _alone(self.places.cache.parent / "e2e.lock")
        self._ours = not running(self.places) and KEEP_VARIABLE not in os.environ
        up(self.places, owner=os.getpid() if self._ours else None)

    def leave(self) -> None:
        """Take it down if this session has brought it up."""
        if self._ours:
            down(self.places)

    def built(self, image: str) -> str:
        """A digest of what it was made from."""
        return Images(self.places).imported(image)

    def volume(self, namespace: str, name: str = "run") -> Path:
        """The folder behind a volume."""
        return self.places.volumes / namespace / name

    def furnish(self, namespace: str) -> None:
        """Folders of the node as volumes, each for one claim only."""
        for name, claim in (("cache", CACHE_CLAIM), ("run", RUN_CLAIM)):
            folder = self.volume(namespace, name)
            folder.mkdir(parents=True)
            node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE_NAME]}
            spec = {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": "local",
                "claimRef": {"namespace": namespace, "name": claim},
                "local": {"path": str(folder)},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [node]}]}},
            }
            metadata = {"name": f"{namespace}-{name}"}
            self.api.create({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec})
        self.claim(namespace, CACHE_CLAIM, "local", "ReadWriteMany")

    def read(self, namespace: str, path: str) -> str:
        """From the folder."""
        file = self.volume(namespace) / path
        return file.read_text() if file.exists() else ""

    def files(self, namespace: str, folder: str) -> list[str]:
        """From the folder."""
        return [path.name for path in (self.volume(namespace) / folder).glob("*")]

    def keep(self, namespace: str, folder: Path) -> None:
        """From the folder, without weights."""
        if self.volume(namespace).exists():
            shutil.copytree(self.volume(namespace), folder, ignore=_LEFT_OUT)

    def forget(self, namespace: str) -> None:
        """The volumes and their folders."""
        for volume in self.api.objects("PersistentVolume"):
            if volume["metadata"]["name"].startswith(f"{namespace}-"):
                self.api.delete(volume)
        shutil.rmtree(self.places.volumes / namespace, ignore_errors=True)


def _alone(path: Path, seconds: float = OTHERS_SECONDS) -> TextIO:
    """Wait until no other run uses the cluster; the kernel forgets the lock with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, deadline, told = path.open("w"), time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SystemExit(f"Another run of these tests has had it for {seconds / 60:.0f} minutes.") from None
        if not told:
            print("waiting for another run of these tests ...", file=sys.stderr, flush=True)
            told = True
        time.sleep(1)
