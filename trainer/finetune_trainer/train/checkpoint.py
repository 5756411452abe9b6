"""Checkpoints as transactions: written aside by all ranks, verified, and published by one rename or not at all.

Layout of `checkpoints/step-00000010/`: the files of torch.distributed.checkpoint, one per rank, and `manifest.json`
with the size and sha256 of each. `step-00000010.tmp` was never published and is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from finetune_api.report import CheckpointRef, FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import flush, sha256_of
from finetune_trainer.train.identity import Identity
from finetune_trainer.train.state import TrainState

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ASIDE = ".tmp"
REMOVED = ".old"
T = TypeVar("T")


class FileRecord(BaseModel):
    """Size and sha256 of one file."""

    bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    """The content of `manifest.json`; `digest` covers all of it, so that a damaged manifest is noticed too."""

    format: int = 1
    step: int
    attempt: str
    time: datetime
    state: TrainState
    identity: Identity
    files: dict[str, FileRecord]
    digest: str = ""

    def computed_digest(self) -> str:
        """sha256 over everything but the digest."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class ValidCheckpoint:
    """A checkpoint that was verified."""

    path: Path
    manifest: CheckpointManifest


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is published."""
    return directory / f"step-{step:08d}"


def published_steps(directory: Path) -> list[int]:
    """Steps of the published checkpoints, ascending, whether they are valid or not."""
    names = (path.name for path in directory.glob("step-*") if path.is_dir())
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def retained(steps: Sequence[int], keep: int, best: int | None, before: int | None) -> set[int]:
    """Which of the published steps (ascending, the last one just written) to keep.

    These are the newest `keep`, the best one, and for a rollback the newest one not after `before`, where the spike
    window begins, with the one after it, which replaces it once the window has passed.
    """
    kept = {*steps[-max(1, keep) :], *(step for step in steps if step == best)}
    if before is not None:
        kept |= {*[step for step in steps if step <= before][-1:], *[step for step in steps if step > before][:1]}
    return kept


class Checkpoints:
    """The checkpoints of one job as one rank sees them. Methods marked collective must be called by all ranks."""

    def __init__(
        self,
        directory: Path,
        group: dist.ProcessGroup,
        *,
        keep: int,
        attempt: str,
        identity: Identity,
        check_fence: Callable[[], None],
    ) -> None:
        """`group` is a gloo group that nothing else uses; `check_fence` raises if another attempt took over."""
        self._directory, self._group = directory, group
        self._keep, self._attempt, self._identity = keep, attempt, identity
        self._check_fence = check_fence
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._saving: Future[None] | None = None
        self.published: CheckpointRef | None = None
        """The newest checkpoint that rank 0 published in this attempt."""
        self.damaged: dict[str, str] = {}
        """Checkpoints that were skipped, with what is wrong with each."""

    # --- saving ---

    def save(self, tensors: dict[str, Tensor], state: TrainState) -> None:
        """Copy the tensors to the host and return; the rest happens in a thread. Collective.

        Waits for the previous save, and raises its error if it failed.
        """
        self.wait()
        state = state.model_copy(deep=True)
        aside = step_directory(self._directory, state.step).with_suffix(ASIDE)
        writer = FileSystemWriter(aside, sync_files=True, overwrite=True)
        written = async_save(tensors, storage_writer=writer, process_group=self._group)
        if not isinstance(written, Future):
            raise TypeError("the writer was expected to stage by itself")
        self._saving = Future()
        arguments = (aside, state, written, self._saving)
        threading.Thread(target=self._finish, args=arguments, daemon=True, name="checkpoint").start()

    @property
    def failed(self) -> bool:
        """Whether the current save has failed on this rank (it then fails on all ranks)."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait until the current save is published. Raises TrainerError: storage-full, fenced."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _finish(self, aside: Path, state: TrainState, written: Future[Any], done: Future[None]) -> None:
        try:
            try:
                written.result()
                files = self._together(lambda: file_records(own_files(aside, self._rank)))
                self._together(lambda: self._publish(aside, state, files) if self._rank == 0 else None)
            except CheckpointException as error:
                raise self._explained(_cause(error), aside) from error
        except BaseException as error:
            if self._rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            done.set_exception(error)
        else:
            done.set_result(None)

    def _together(self, act: Callable[[], T]) -> list[T]:
        """Results of all ranks; the first exception of any rank is raised on all."""
        results: list[Any] = [None] * self._world_size
        try:
            own: Any = act()
        except Exception as error:
            own = error
        dist.all_gather_object(results, own, group=self._group)
        for result in results:
            if isinstance(result, Exception):
                raise CheckpointException("checkpoint", {self._rank: (result, None)})  # type: ignore[dict-item]
        return results

    def _publish(self, aside: Path, state: TrainState, files: list[dict[str, FileRecord]]) -> None:
        manifest = CheckpointManifest(
            step=state.step,
            attempt=self._attempt,
            time=datetime.now(UTC),
            state=state,
            identity=self._identity,
            files={name: record for part in files for name, record in part.items()},
        )
        manifest.digest = manifest.computed_digest()
        with (aside / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        flush(aside)
        final = step_directory(self._directory, state.step)
        self._check_fence()
        if final.exists():
            _remove(final)  # damaged and skipped, otherwise this step would not have been repeated
        aside.rename(final)
        flush(self._directory)
        self._thin_out(state)
        path = f"{self._directory.name}/{final.name}"
        self.published = CheckpointRef(step=state.step, path=path, time=manifest.time)

    def _thin_out(self, state: TrainState) -> None:
        steps = published_steps(self._directory)
        valid = [step for step in steps if str(step_directory(self._directory, step)) not in self.damaged]
        best = state.best.step if state.best else None
        before = state.spikes.window[0][0] if state.spikes.window else None
        for step in set(valid) - retained(valid, self._keep, best, before):
            _remove(step_directory(self._directory, step))

    def _explained(self, error: Exception, aside: Path) -> Exception:
        """The error, for a full disk with the checkpoint, the space it needs and what is left to resume from."""
        if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            return error
        usage = shutil.disk_usage(self._directory)
        steps = published_steps(self._directory)
        intact = f"Checkpoint {steps[-1]} is intact." if steps else "There is no earlier checkpoint."
        last = sum(f.stat().st_size for f in step_directory(self._directory, steps[-1]).iterdir()) if steps else 0
        needed = f"; the last checkpoint has {_size(last)}" if last else ""
        return TrainerError(
            FailureClass.STORAGE_FULL,
            f"No space left for checkpoint {aside.with_suffix('')}: {_size(usage.free)} of {_size(usage.total)} free"
            f"{needed}. {intact} Increase storage.run.size, or lower checkpoint.keep.",
            "storage.run.size",
        )

    # --- reading ---

    def newest(self, at_most: int | None = None) -> ValidCheckpoint | None:
        """The newest valid checkpoint, of at most `at_most` steps. Collective.

        Damaged ones are skipped and recorded in `damaged`; each rank verifies a part of the files.
        """
        listed = published_steps(self._directory) if self._rank == 0 else []
        steps = self._from_rank_0([step for step in listed if at_most is None or step <= at_most])
        for step in reversed(steps):
            found = self.check(step_directory(self._directory, step))
            if found is not None:
                return found
        return None

    def at(self, step: int) -> ValidCheckpoint | None:
        """The checkpoint after `step` steps, if it is valid. Collective."""
        return self.check(step_directory(self._directory, step))

    def check(self, path: Path) -> ValidCheckpoint | None:
        """The checkpoint at `path` if it is valid, otherwise None and an entry in `damaged`. Collective."""
        text, problem = self._from_rank_0(_read_manifest(path) if self._rank == 0 else ("", ""))
        if not problem:
            manifest = CheckpointManifest.model_validate_json(text)
            names = sorted(manifest.files)[self._rank :: self._world_size]
            problems = self._together(lambda: first_problem(path, {name: manifest.files[name] for name in names}))
            problem = next(filter(None, problems), "")
            if not problem:
                return ValidCheckpoint(path, manifest)
        self.damaged[str(path)] = problem
        return None

    def restore(self, checkpoint: ValidCheckpoint, tensors: dict[str, Tensor]) -> None:
        """Read the checkpoint into `tensors`; any number of ranks may have written it. Collective."""
        try:
            load(dict(tensors), storage_reader=FileSystemReader(checkpoint.path), process_group=self._group)
        except CheckpointException as error:
            raise RuntimeError(f"{checkpoint.path} cannot be read: {_cause(error)}") from error

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints after `step`, newest first. Collective."""
        self.wait()
        if self._rank == 0:
            for newer in reversed([s for s in published_steps(self._directory) if s > step]):
                _remove(step_directory(self._directory, newer))
        dist.barrier(group=self._group)

    def clean(self) -> None:
        """Remove what earlier attempts left unpublished. Collective."""
        if self._rank == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for suffix in (ASIDE, REMOVED):
                for left in self._directory.glob(f"step-*{suffix}"):
                    shutil.rmtree(left, ignore_errors=True)
        dist.barrier(group=self._group)

    def _from_rank_0(self, value: T) -> T:
        values: list[Any] = [value]
        dist.broadcast_object_list(values, group_src=0, group=self._group)
        result: T = values[0]
        return result


def own_files(aside: Path, rank: int) -> list[Path]:
    """Files that `rank` wrote; rank 0 also wrote the metadata."""
    return sorted(aside.glob(f"__{rank}_*")) + ([aside / ".metadata"] if rank == 0 else [])


def file_records(paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Sizes and sha256 by name."""
    return {path.name: FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path)) for path in paths}


def first_problem(path: Path, files: dict[str, FileRecord]) -> str:
    """What is wrong with the first damaged one of these files of a checkpoint; empty if all are valid."""
    for name, record in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != record.bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {record.bytes}"
        if sha256_of(file) != record.sha256:
            return f"{name} is corrupt: its checksum differs"
    return ""


def _read_manifest(path: Path) -> tuple[str, str]:
    """The manifest's text, or what is wrong with it."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = CheckpointManifest.model_validate_json(text)
    except FileNotFoundError:
        return "", f"{MANIFEST} is missing"
    except (OSError, ValidationError, UnicodeDecodeError):
        return "", f"{MANIFEST} cannot be read"
    if manifest.digest != manifest.computed_digest():
        return "", f"{MANIFEST} is corrupt: its checksum differs"
    return text, ""


def _remove(path: Path) -> None:
    """Rename a checkpoint, so that it is gone in one step, then delete it."""
    removed = path.with_suffix(REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _cause(error: CheckpointException) -> Exception:
    """The first rank's own exception; one that says the disk is full first of all."""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    full = [c for c in causes if isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT)]
    cause = (full or causes)[0]
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
