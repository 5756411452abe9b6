"""The repository holds nothing foreign. Style, types, arrows, dead code and generated files: `make verify`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


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
