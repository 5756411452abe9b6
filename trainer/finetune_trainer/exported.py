"""The digest that ties together what Train wrote, Evaluate measured and Publish uploads."""

from __future__ import annotations

import hashlib
from pathlib import Path

CHUNK_BYTES = 1 << 20


def export_files(directory: Path) -> list[Path]:
    """All files of an export but hidden ones, sorted by their relative name."""
    found = (path for path in directory.rglob("*") if path.is_file())
    visible = (path for path in found if not any(p.startswith(".") for p in path.relative_to(directory).parts))
    return sorted(visible, key=lambda path: path.relative_to(directory).as_posix())


def export_digest(directory: Path) -> str:
    """sha256 over the names and sha256 digests of the files, in the form that `sha256sum` prints.

    By hand: `find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum` inside the directory.
    """
    whole = hashlib.sha256()
    for path in export_files(directory):
        whole.update(f"{file_sha256(path)}  {path.relative_to(directory).as_posix()}\n".encode())
    return whole.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
