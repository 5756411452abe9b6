"""The job's record on this machine: `status.json` in the run directory, in the form of the resource.

One directory per job and uid: `<workdir>/<namespace>/<name>/<uid>`. A lock beside it admits one run at a time. The
directory may have come with a checkout: links in it are refused, so that nothing outside is written or removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.files import write_json
from finetune_api.runconfig import RUN_CONFIG_FILE
from finetune_api.spec import FineTuneJob, ObjectMeta
from finetune_api.status import JobStatus
from finetune_operator.errors import EXIT_FAILED, UserError

STATUS_FILE = "status.json"


@dataclass
class Record:
    """A job and its status in one run directory."""

    run: Path
    job: FineTuneJob
    status: JobStatus

    @property
    def uid(self) -> str:
        """The job's uid: the name of its run directory."""
        return self.job.metadata.uid

    @property
    def config_file(self) -> Path:
        """The run config that the trainer reads."""
        return self.run / RUN_CONFIG_FILE

    def wire(self) -> dict[str, Any]:
        """The whole resource, as `kubectl get -o json` would print it."""
        resource = self.job.to_wire()
        return resource | {"status": self.status.to_wire()}

    def save(self) -> None:
        """Write `status.json`; a reader sees the old or the new state, never a part."""
        write_json(self.run / STATUS_FILE, self.wire(), indent=1)


def job_directory(workdir: Path, job: FineTuneJob) -> Path:
    """Directory of all runs of a job's name."""
    return workdir / job.metadata.namespace / job.metadata.name


def find(directory: Path) -> Record | None:
    """The newest run below a job's directory, or None. Raises UserError if its record cannot be read."""
    files = sorted(directory.glob(f"*/{STATUS_FILE}"), key=lambda file: file.stat().st_mtime)
    return read(files[-1].parent) if files else None


def read(run: Path) -> Record:
    """The record in one run directory. Raises UserError if it cannot be read or the directory contains links."""
    # What a run writes itself; the trackers below keep links of their own.
    _refuse_links(run, *run.glob("*"), *run.glob("logs/**/*"), *run.glob("reports/*"))
    try:
        resource = json.loads((run / STATUS_FILE).read_text(encoding="utf-8"))
        if not isinstance(resource, dict):
            raise ValueError("not a JSON object")
        status = JobStatus.parse(resource.pop("status", None))
        job = FineTuneJob.model_validate(resource)
        if job.metadata.uid != run.name:
            raise ValueError("the record of another run")
        return Record(run, job, status)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{run / STATUS_FILE} cannot be read ({type(error).__name__}): remove {run} to start over, "
            "or add --fresh to keep it and start a new run.",
            EXIT_FAILED,
        ) from error


def create(directory: Path, job: FineTuneJob) -> Record:
    """A new run of `job` with a uid of its own; nothing is written yet."""
    uid = str(uuid.uuid4())
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    given = job.metadata.model_dump(by_alias=True)
    metadata = ObjectMeta.model_validate(given | {"uid": uid, "generation": 1, "creationTimestamp": created})
    return Record(directory / uid, job.model_copy(update={"metadata": metadata, "status": None}), JobStatus())


def _refuse_links(*paths: Path) -> None:
    link = next((path for path in paths if path.is_symlink()), None)
    if link is not None:
        raise UserError(
            f"{link} is a link, and finetune run writes only to its own directories: remove it, or choose another "
            "directory with --workdir.",
            EXIT_FAILED,
        )


def _refuse_strangers(directory: Path) -> None:
    """Raise UserError if the directory belongs to somebody else than the files that this process creates in it."""
    with tempfile.TemporaryFile(dir=directory) as file:
        if os.fstat(file.fileno()).st_uid != directory.stat().st_uid:
            raise UserError(
                f"{directory} belongs to another user, who could change what this job runs: choose another directory "
                "with --workdir.",
                EXIT_FAILED,
            )


@contextmanager
def locked(directory: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the job's lock: no second `finetune run` of it may start.

    Raises UserError if another process holds it, or the directory is not this user's own. The kernel releases the lock
    when the process ends, in whatever way.
    """
    _refuse_links(directory.parent, directory, directory / name)
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(directory)
    descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{directory.parent.name}/{directory.name} is already running (process {holder}): wait for it, "
                "stop it with Ctrl-C, or give this job a different name.",
                EXIT_FAILED,
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
