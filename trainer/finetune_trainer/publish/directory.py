"""Publishing into a directory: written aside, renamed once it is whole; never over something else."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import flush
from finetune_trainer.publish.hub import digest

Files = Mapping[str, Path | bytes]


def refuse_other_content(directory: Path, files: Files | None = None) -> None:
    """Raise TrainerError (bad-spec) unless `directory` is missing, empty, or holds exactly `files`."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise TrainerError(
            FailureClass.BAD_SPEC, f"{directory} is a file: set publish.path to a directory.", "publish.path"
        )
    if any(directory.iterdir()) and not (files is not None and holds(directory, files)):
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"{directory} contains other files, which are not overwritten: empty it or choose another directory.",
            "publish.path",
        )


def holds(directory: Path, files: Files) -> bool:
    """Whether the directory holds exactly these files."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return found.keys() == files.keys() and all(
        digest(found[name], "sha256") == digest(content, "sha256") for name, content in files.items()
    )


def copy(directory: Path, files: Files) -> None:
    """Make `directory` hold exactly these files, durably and at once; nothing happens if it does already."""
    refuse_other_content(directory, files)
    if directory.exists() and holds(directory, files):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = directory.with_name(f".{directory.name}.publishing")
    shutil.rmtree(aside, ignore_errors=True)
    for name, content in files.items():
        target = aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)
        flush(target)
    if directory.exists():
        directory.rmdir()  # empty, else it was refused
    aside.rename(directory)
    flush(directory.parent)
