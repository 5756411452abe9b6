"""Files that survive a crash: flushed to disk, known by their content, made once. Knows nothing of what is in them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

DONE = ".complete"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT calls the files of an adapter."""


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Return when a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def made_once(directory: Path, write: Callable[[Path], None]) -> Path:
    """`directory` with what `write` puts into the one it is given, written the first time somebody asks for it.

    Written aside and renamed into place under a lock: other jobs wait for it or find it whole.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if (directory / DONE).exists():
            return directory
        aside = directory.with_name(f".{directory.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            write(aside)
            for path in aside.rglob("*"):
                flush(path)
            (aside / DONE).touch()
            shutil.rmtree(directory, ignore_errors=True)
            aside.rename(directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return directory
