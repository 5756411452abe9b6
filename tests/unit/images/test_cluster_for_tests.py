"""The cluster that the end-to-end tests run on: what it says where it cannot be, and how layers are named."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from tests.cluster import images, machine
from tests.integration.harness import binaries


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
