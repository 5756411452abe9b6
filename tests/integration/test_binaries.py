"""Programs are found where they are, built once, and never left half-built."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import binaries


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing was built, and no other source of programs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return binaries.cache_folder()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the programs built so far, by a compiler that only pretends."""
    built: list[str] = []

    def build(program: binaries.Program, target: Path) -> None:
        built.append(program.name)
        target.write_text("#!/bin/sh\n")

    monkeypatch.setattr(binaries, "_build", build)
    return built


def test_a_program_is_built_once_and_kept_by_version(empty_cache: Path, builds: list[str]) -> None:
    first, second = binaries.ensure("kube-apiserver"), binaries.ensure("kube-apiserver")
    assert first == second == empty_cache / f"kube-apiserver-{binaries.KUBERNETES_VERSION}" / "kube-apiserver"
    assert builds == ["kube-apiserver"]


def test_a_program_offered_by_the_environment_is_not_built(
    empty_cache: Path, builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = tmp_path / "assets" / "etcd"
    offered.parent.mkdir()
    offered.touch(mode=0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(offered.parent))
    assert binaries.ensure("etcd") == offered
    assert builds == []
    assert "etcd" not in binaries.missing()


def test_a_build_that_breaks_off_leaves_nothing_that_looks_built(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(_: binaries.Program, target: Path) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(binaries, "_build", break_off)
    with pytest.raises(KeyboardInterrupt):
        binaries.ensure("etcd")
    assert [path.name for path in empty_cache.iterdir() if path.is_dir()] == []
    assert "etcd" in binaries.missing()


def test_without_a_compiler_one_sentence_says_what_to_install(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(binaries.BinaryUnavailableError, match=r"install Go .* KUBEBUILDER_ASSETS"):
        binaries.ensure("training-operator")
