"""What is asked of the Hub: may we read this, which commit is it, bring the files here once.

Access is asked for, not tried by a download: a file in the cache would hide that the token has no right to it.
The token goes into the client's header and nowhere else.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.hub_errors import first_line, root_of, status_of
from finetune_trainer.prepare.fetched import MOST_FILES, is_inside

Kind = Literal["model", "dataset"]

CALL_SECONDS = 30.0
"""Time-out of one call; the client has none of its own for calls that download nothing."""
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class RepoFile:
    """One file of a repository."""

    name: str
    size: int


@dataclass(frozen=True)
class ResolvedRepo:
    """A repository at one commit, readable with the token."""

    repo: str
    kind: Kind
    commit: str
    files: tuple[RepoFile, ...]

    @property
    def names(self) -> list[str]:
        """Names of its files."""
        return [file.name for file in self.files]

    def size(self, names: Sequence[str]) -> int:
        """Bytes of these files."""
        wanted = set(names)
        return sum(file.size for file in self.files if file.name in wanted)


class Hub:
    """The Hub with one token and one cache directory. Every error is a TrainerError with a sentence."""

    def __init__(self, token: str | None, cache: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """cache: directory of downloads (the layout of `HF_HUB_CACHE`); progress: called with (bytes, bytes in all)."""
        self._token: str | Literal[False] = token or False
        self._cache = cache
        self._progress = progress
        self._api = HfApi(token=self._token)

    def resolve(self, repo: str, revision: str, kind: Kind, field: str) -> ResolvedRepo:
        """The commit that `revision` is now, and its files, after access was checked.

        Raises TrainerError: no-access (no such repository, no rights, terms not accepted, disabled), bad-spec (no
        such revision), hub-unavailable.
        """
        with self._explained(repo, revision, kind, field):
            get_session().timeout = CALL_SECONDS
            self._api.auth_check(repo, repo_type=kind)
            info: Any = self._api.repo_info(repo, revision=revision, repo_type=kind, timeout=CALL_SECONDS)
            entries = self._api.list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind)
            listed = (RepoFile(entry.path, entry.size) for entry in entries if hasattr(entry, "size"))
            files = tuple(islice(listed, MOST_FILES + 1))
        if len(files) > MOST_FILES:
            sentence = f"The {kind} {repo} has more than {MOST_FILES:,} files: use a revision with fewer, or a path."
            raise TrainerError(FailureClass.BAD_DATA, sentence, f"{field}.repo")
        outside = next((file.name for file in files if not is_inside(file.name)), None)
        if outside is not None:
            sentence = f"The {kind} {repo} cannot be used: its file {outside[:200]!r} would lie outside of it."
            raise TrainerError(FailureClass.BAD_DATA, sentence, f"{field}.repo")
        return ResolvedRepo(repo, kind, str(info.sha), files)

    def directory(self, resolved: ResolvedRepo) -> Path:
        """Where its files lie once they are downloaded."""
        folder = self._cache / repo_folder_name(repo_id=resolved.repo, repo_type=resolved.kind)
        return folder / "snapshots" / resolved.commit

    def download(self, resolved: ResolvedRepo, names: Sequence[str], field: str) -> Path:
        """Directory with these files at that commit; what is there already is not fetched again.

        The client locks each file and writes it aside, so jobs may share the cache and be killed at any time.
        """
        total = resolved.size(names)
        with self._explained(resolved.repo, resolved.commit, resolved.kind, field):
            return Path(
                snapshot_download(
                    resolved.repo,
                    repo_type=resolved.kind,
                    revision=resolved.commit,
                    cache_dir=self._cache,
                    token=self._token,
                    allow_patterns=[glob.escape(name) for name in names],
                    max_workers=4,
                    tqdm_class=_meter(self._progress, resolved.size(self._present(resolved, names)), total),
                )
            )

    def _present(self, resolved: ResolvedRepo, names: Sequence[str]) -> list[str]:
        """Which of the files are in the cache already."""
        directory = self.directory(resolved)
        return [name for name in names if (directory / name).exists()]

    @contextmanager
    def _explained(self, repo: str, revision: str, kind: Kind, field: str) -> Iterator[None]:
        try:
            yield
        except (HfHubHTTPError, httpx2.HTTPError, LocalEntryNotFoundError, HFValidationError, RuntimeError) as error:
            raise explain(error, repo, revision, kind, field, signed_in=bool(self._token)) from error
        except OSError as error:
            # What a download of the wrong length ends as; a full disk keeps its own class.
            if "Consistency check failed" not in str(error):
                raise
            raise explain(error, repo, revision, kind, field, signed_in=bool(self._token)) from error


def explain(error: BaseException, repo: str, revision: str, kind: Kind, field: str, *, signed_in: bool) -> TrainerError:
    """The failure that an error of the Hub's client amounts to, with what to do about it."""
    root = root_of(error)
    page = f"{constants.ENDPOINT}/datasets/{repo}" if kind == "dataset" else f"{constants.ENDPOINT}/{repo}"
    status = status_of(root)
    sentence = _no_access(root, repo, page, kind, status, signed_in)
    if sentence:
        return TrainerError(FailureClass.NO_ACCESS, sentence, f"{field}.repo")
    if isinstance(root, RevisionNotFoundError):
        return TrainerError(
            FailureClass.BAD_SPEC,
            f"The {kind} {repo} has no revision {revision!r}: name a branch, tag or commit of {page}.",
            f"{field}.revision",
        )
    if isinstance(root, HFValidationError):
        return TrainerError(FailureClass.BAD_SPEC, f"{repo!r} is not a valid repository name: {root}", f"{field}.repo")
    if isinstance(root, EntryNotFoundError) and not isinstance(root, LocalEntryNotFoundError):
        return TrainerError(
            FailureClass.BAD_DATA, f"A file of the {kind} {repo} is missing: {first_line(root)}", f"{field}.repo"
        )
    if status is not None and status not in TRANSIENT_STATUS and status < 500:
        return TrainerError(
            FailureClass.NO_ACCESS, f"The Hub refused {repo} (status {status}): {first_line(root)}", f"{field}.repo"
        )
    answer = f"status {status}" if status is not None else type(root).__name__
    if isinstance(root, OfflineModeIsEnabled):
        answer = "HF_HUB_OFFLINE is set"
    return TrainerError(
        FailureClass.HUB_UNAVAILABLE,
        f"The Hub did not deliver {repo} ({answer}). Without access to the Hub, use path instead of repo.",
        f"{field}.repo",
    )


def _no_access(
    error: BaseException, repo: str, page: str, kind: Kind, status: int | None, signed_in: bool
) -> str | None:
    if isinstance(error, DisabledRepoError):
        return f"The {kind} {repo} was disabled on the Hub: see {page}."
    if isinstance(error, GatedRepoError):
        if not signed_in:
            return (
                f"The {kind} {repo} is gated and no token was given: accept its terms at {page}, "
                "then set a read token in credentials.hub (locally: HF_TOKEN)."
            )
        return f"The {kind} {repo} is gated: accept its terms at {page} with the account of the token, then run again."
    if status == 401 and signed_in and not isinstance(error, RepositoryNotFoundError):
        return f"The Hub rejected the token for {repo}: create one at {constants.ENDPOINT}/settings/tokens."
    if isinstance(error, RepositoryNotFoundError):
        who = (
            "the token's account has no access to it"
            if signed_in
            else "it is private (then set credentials.hub; locally: HF_TOKEN)"
        )
        return f"There is no {kind} {repo} on the Hub, or {who}: check the name at {page}."
    if status in (401, 403):
        what = "The token has no read access to" if signed_in else "A token is needed to read"
        return f"{what} {repo}: set a read token in credentials.hub (locally: HF_TOKEN) and see {page}."
    return None


def _meter(progress: Callable[[int, int], None] | None, present: int, total: int) -> type:
    """A progress bar that draws nothing and tells `progress` the bytes of the whole download."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Meter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # Of the client's three bars this one counts what reached the disk.
            self._counts = str(options.get("desc", "")).startswith("Reconstructing")
            options.pop("name", None)
            super().__init__(*args, **(options | {"disable": True}))
            self._bytes = present

        def update(self, n: float | None = 1) -> bool:
            if self._counts and progress is not None:
                self._bytes += int(n or 0)
                progress(min(self._bytes, total), total)
            return bool(super().update(n))

    return Meter
