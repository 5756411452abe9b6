"""What `digest.json` says of an export, which every stage that reads one checks: without torch, quick to import.

`export_digest` is the only way to learn the digest of an export, and it reads every byte. An export holds regular
files only: a link could lead to a token that is mounted where the export is read, but not where it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from finetune_api.base import Stage
from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import sha256_of

DIGEST_FILE = "digest.json"


def export_digest(directory: Path) -> str:
    """The digest of an export, from every byte of it.

    Raises TrainerError if a file is missing, unknown or not what `digest.json` says.
    """
    try:
        known: dict[str, Any] = dict(json.loads((directory / DIGEST_FILE).read_text())["files"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise TrainerError(
            FailureClass.CRASH, f"{directory} is not a complete export: {DIGEST_FILE} is missing or damaged."
        ) from error
    found = _digests(directory)
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) != found.get(name):
            what = "is missing" if name not in found else "was added" if name not in known else "was changed"
            raise TrainerError(FailureClass.CRASH, f"The export was altered: {directory / name} {what}.")
    return _total(found)


def refuse_other(place: str, found: str, reported: str, stage: Stage) -> None:
    """Raise TrainerError (bad-data) if what a stage left is not what it reported; an empty digest says nothing."""
    if reported and found != reported:
        name = stage.capitalize()
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"{place} (digest {found[:12]}…) differs from what {name} reported ({reported[:12]}…): "
            f"run the {name} stage again.",
            place,
        )


def write_digest(directory: Path) -> None:
    """Write `digest.json` for the files that are there."""
    digests = _digests(directory)
    content = {"digest": _total(digests), "files": digests}
    (directory / DIGEST_FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def files_of(directory: Path) -> list[Path]:
    """All files of an export, sorted. Raises TrainerError at anything that is neither a regular file nor a folder."""
    files: list[Path] = []
    folders = [directory]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    files.append(Path(entry.path))
                else:
                    raise TrainerError(
                        FailureClass.CRASH, f"The export was altered: {entry.path} is a link or a special file."
                    )
    return sorted(files)


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(directory).as_posix(): {"sha256": sha256_of(path), "size": path.stat().st_size}
        for path in files_of(directory)
        if path != directory / DIGEST_FILE
    }


def _total(digests: dict[str, dict[str, Any]]) -> str:
    lines = "".join(f"{name}\0{digests[name]['sha256']}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
