"""The repository keeps its own promises: style, types, dependency arrows, generated files, nothing foreign."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
        ["python", "-m", "finetune_api.generate", "--check"],
    ],
    ids=" ".join,
)
def test_the_repository_is_clean(command: list[str]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_binary_and_no_lock_file_with_addresses_is_committed() -> None:
    for path in _tracked():
        assert path.name not in {"uv.lock", "poetry.lock", "pdm.lock"}, path
        assert path.suffix not in {".safetensors", ".gguf", ".bin", ".pt", ".whl", ".parquet"}, path
        assert path.stat().st_size < 1_000_000, path


def test_no_path_of_one_machine_and_no_token_is_committed() -> None:
    private = re.compile(r"(^|[\s\"'=(])/(home|Users|work|root)/[a-z]|\bhf_[A-Za-z0-9]{30,}\b")
    for path in _tracked():
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not private.search(text), path


def test_the_packages_do_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert not (ROOT / "trainer" / "__init__.py").exists()
