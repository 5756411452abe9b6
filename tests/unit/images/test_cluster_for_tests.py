"""The cluster that the end-to-end tests run on: what it says where it cannot be, and how layers are named."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.cluster import images, machine, supervisor
from tests.cluster.places import Places
from tests.integration.harness import binaries

ROOT = Path(__file__).parents[3]


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has everything; each test takes one thing away."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "missing_packages", list)
    monkeypatch.setattr(machine, "_can_mount", lambda: True)
    monkeypatch.setattr(machine, "_too_small", lambda cache: None)
    monkeypatch.setattr(binaries, "missing", lambda names: [])
    return tmp_path


def test_a_machine_that_has_everything_lacks_nothing(able: Path) -> None:
    assert machine.lacks(able) is None


@pytest.mark.parametrize(
    ("target", "name", "value", "says"),
    [
        (machine.platform, "system", lambda: "Darwin", "needs Linux"),
        (os, "geteuid", lambda: 1000, "needs root"),
        (machine, "_can_mount", lambda: False, "has to mount file systems"),
        (machine, "_too_small", lambda cache: "Building takes 40 GB.", "40 GB"),
    ],
    ids=["system", "root", "mounts", "disk"],
)
def test_what_a_machine_lacks_is_said_in_one_sentence(
    able: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, value: object, says: str
) -> None:
    monkeypatch.setattr(target, name, value)
    said = machine.lacks(able)
    assert said is not None
    assert says in said
    assert "\n" not in said


def test_packages_that_cannot_be_installed_are_named(able: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_packages", lambda: ["containerd", "runc"])
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "containerd, runc" in str(machine.lacks(able))


def test_a_layer_is_named_by_all_layers_below_it() -> None:
    layers = [images.Blob(f"sha256:{letter * 64}", 1, b"") for letter in "abc"]
    first, second, third = images._chains(layers)
    assert first == layers[0].digest
    assert second == "sha256:" + hashlib.sha256(f"{first} {layers[1].digest}".encode()).hexdigest()
    assert third == "sha256:" + hashlib.sha256(f"{second} {layers[2].digest}".encode()).hexdigest()


def test_a_hollow_layer_is_known_from_a_whole_one_and_takes_no_space(tmp_path: Path) -> None:
    whole = tmp_path / "layer"
    whole.write_bytes(b"x" * images.LARGE_BYTES)
    assert not images._is_hollow(whole)
    images._make_hollow(whole)
    assert images._is_hollow(whole)
    assert whole.stat().st_size == images.LARGE_BYTES


def end_to_end(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the end-to-end tests where they cannot be run."""
    command = [sys.executable, "-m", "pytest", "tests/e2e", "-q", "-p", "no:cacheprovider", *options]
    own = {"FINETUNE_TEST_CLUSTER": str(folder)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FINETUNE_")} | own | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_tests_that_need_a_cluster_are_listed_where_there_can_be_none_and_nothing_fails(tmp_path: Path) -> None:
    done = end_to_end(tmp_path, FINETUNE_TEST_KUBECONFIG=str(tmp_path / "none"))
    _, listed = done.stdout.split("not run on this machine")
    assert done.returncode == 0, done.stdout
    assert "::test_what_is_published_is_as_good_as_the_status_says: The given cluster cannot be used: there" in listed


def test_who_names_a_cluster_for_these_tests_is_told_why_it_cannot_be_used(tmp_path: Path) -> None:
    done = end_to_end(tmp_path, "--kubeconfig", str(tmp_path / "none"))
    assert done.returncode == 1
    assert f"The given cluster cannot be used: there is no file {tmp_path / 'none'}." in done.stdout


class Kubelet:
    """Notes what happens to it; the cluster's owner ends with its second start."""

    def __init__(self, places: Places, owner: subprocess.Popen[bytes]) -> None:
        self.pid: int | None = 1
        self.seen: list[str] = []
        self._places, self._owner = places, owner

    def stop(self) -> None:
        self.seen.append("stopped")
        self.pid = None
        self._places.kubelet_away_file.unlink()

    def start(self) -> None:
        self.seen.append("started")
        self._owner.kill()
        self._owner.wait()


def test_the_kubelet_is_stopped_and_started_as_a_file_says_until_the_clusters_owner_has_ended(tmp_path: Path) -> None:
    places = Places(tmp_path, tmp_path)
    places.kubelet_away_file.touch()
    owner = subprocess.Popen(["sleep", "60"])
    kubelet = Kubelet(places, owner)
    supervisor._stay(places, SimpleNamespace(kubelet=kubelet), owner.pid)  # type: ignore[arg-type]
    assert kubelet.seen == ["stopped", "started"]


@pytest.mark.parametrize(
    ("there", "held"),
    [
        ([], []),
        (["trainer"], ["tag trainer trainer-former", "rm trainer-former"]),
        (["trainer", "trainer-former"], ["rm trainer-former"]),
    ],
    ids=["the first image", "an image", "after an import that failed"],
)
def test_layers_of_the_former_image_are_held_until_a_new_one_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], held: list[str]
) -> None:
    said: list[str] = []

    def ctr(_: Places, *words: str, check: bool = True) -> SimpleNamespace:
        if words[:2] == ("images", "ls"):
            return SimpleNamespace(stdout="\n".join(there))
        said.append(" ".join(words[1:]))
        return SimpleNamespace(stdout="")

    monkeypatch.setattr(images, "ctr", ctr)
    with images.Images(Places(tmp_path, tmp_path))._former_kept("trainer"):
        before = list(said)
    assert before == held[:-1]
    assert [word for word in said if there] == held
