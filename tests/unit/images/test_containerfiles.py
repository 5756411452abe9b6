"""The two images: what they are built from, who they run as, and with which tool."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.scripts import load_script

from finetune_operator.manifests.pod import USER

ROOT = Path(__file__).parents[3]
CONTAINERFILES = sorted((ROOT / "images").glob("*/Containerfile"))


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load_script("images/build.py", "images_build")


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.parent.name)
def test_an_image_runs_as_the_user_that_pods_run_as(path: Path) -> None:
    assert [words for name, words in instructions(path) if name == "USER"] == [f"{USER}:{USER}"]


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.parent.name)
def test_a_change_of_code_leaves_the_layer_of_the_dependencies_as_it_was(path: Path) -> None:
    steps = instructions(path)
    last_stage = steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]
    copied = [words.split()[:-1] for name, words in last_stage if name == "COPY"]
    assert copied[0] == ["pyproject.toml", "hashes.txt", "images/build-tools.txt"]
    assert copied[1:] == [["--from=project", "/opt/project"]]
    (code,) = [i for i, (_, words) in enumerate(last_stage) if words.startswith("--from=project")]
    assert "RUN" not in [name for name, _ in last_stage[code:]], "made again after every change of code"


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.parent.name)
def test_everything_that_is_copied_is_let_into_the_build(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, words in instructions(path):
        if name == "COPY" and "--from" not in words:
            for source in words.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch(source, pattern) for pattern in allowed), source


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;\n]+)", (ROOT / name).read_text(), flags=re.MULTILINE))


def test_what_builds_the_images_is_pinned_and_agrees_with_the_projects_own_pins() -> None:
    tools, project = pins("images/build-tools.txt"), pins("constraints.txt")
    assert {"uv", "hatchling", "cyclonedx-bom"} <= tools.keys()
    assert {name: project.get(name, version) for name, version in tools.items()} == tools


def test_every_package_that_is_installed_is_pinned() -> None:
    installed = {
        re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(): found.version for found in metadata.distributions()
    }
    project = pins("constraints.txt")
    unpinned = {name for name, version in installed.items() if project.get(name) != version}
    assert unpinned <= {"finetune-operator", "pip"}


def test_every_pinned_package_has_hashes() -> None:
    pinned = pins("constraints.txt") | pins("images/build-tools.txt")
    assert pins("hashes.txt") == pinned, "run `make hashes`, and commit the result"
    _, *entries = re.split(r"^(?=[a-z])", (ROOT / "hashes.txt").read_text(), flags=re.MULTILINE)
    for entry in entries:
        head, *hashes = entry.rstrip().split(" \\\n")
        assert hashes, head
        assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}", line) for line in hashes), head


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.parent.name)
def test_an_image_installs_only_files_whose_hashes_are_known(path: Path) -> None:
    installs = [
        words
        for name, step in instructions(path)
        for words in step.split(" && ")
        if name == "RUN" and "pip install" in words
    ]
    built_here = [words for words in installs if "/dist/" in words]
    assert len(built_here) == 1
    assert all("--require-hashes" in words for words in installs if words not in built_here)
    assert len(installs) == 6


@pytest.mark.parametrize("name", ["podman", "buildah", "docker"])
def test_each_tool_builds_the_same_file_from_the_root_of_the_repository(build: ModuleType, name: str) -> None:
    words = build.command(build.Tool(name, ("--root", "r")), "trainer", "finetune-trainer:1", "base:1")
    assert words[:4] == [name, "--root", "r", "build"]
    assert words[-1] == "."
    assert words[words.index("--file") + 1] == "images/trainer/Containerfile"
    assert "BASE=base:1" in words
    assert f"VERSION={build.project_version()}" in words
    assert any(build.EPOCH in word for word in words), "files carry the time of the build"


def test_without_a_tool_one_sentence_says_so(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"Cannot build images: none of podman, buildah, docker is installed"):
        build.main([])


def test_what_comes_after_two_dashes_is_said_to_the_tool(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "podman").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    (tmp_path / "podman").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # git is not there either
    build.main(["operator", "--base", "base:1", "--", "--isolation", "chroot"])
    asked, built = (tmp_path / "said").read_text().splitlines()
    assert asked == "info"
    assert built.startswith("build --layers")
    assert built.endswith("--build-arg REVISION=unknown --build-arg BASE=base:1 --isolation chroot .")
