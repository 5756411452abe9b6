"""Files that operator and trainer write for each other."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Write JSON durably, so that a reader sees the old or the new file, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=indent)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
