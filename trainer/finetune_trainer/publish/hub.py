"""Uploading to the Hub: rights and privacy first, one commit, the same result however often it is done.

The client retries some calls by itself, but neither creation nor the commit; here the whole upload is tried again,
which costs little: files that are there already are not sent, and a commit that was applied is not made twice.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.hub_errors import first_line, root_of, status_of

log = logging.getLogger(__name__)

CALL_SECONDS = 60.0
"""Time-out of one call; the client has none of its own."""
AGAIN_STATUS = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
CLIENT_ERRORS = (
    HfHubHTTPError,
    httpx2.HTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RuntimeError,
    ConnectionError,
    TimeoutError,
)
TRIES = 5
LONGEST_PAUSE_SECONDS = 120.0
BLOCK_BYTES = 1 << 22

MODEL_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
MODEL_CONFIGS = frozenset({"adapter_config.json", "config.json", "model.safetensors.index.json"})


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now."""

    commit: str
    url: str


class Target:
    """One model repository, written to with one token."""

    def __init__(self, repo: str, *, private: bool, token: str | None):
        self.repo, self.private = repo, private
        if token is None:
            raise TrainerError(
                FailureClass.NO_ACCESS,
                f"Publishing to {repo} needs a write token: create one at {constants.ENDPOINT}/settings/tokens and set "
                "it in credentials.publish (locally: HF_PUBLISH_TOKEN).",
                "credentials.publish",
            )
        self._api = HfApi(token=token)
        get_session().timeout = CALL_SECONDS

    # -- before anything is trained -----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise TrainerError unless an upload would be accepted. Makes nothing."""
        with self._explained():
            self._again(self._complete_name)
            info = self._again(self._info)
            if info is None:
                self._check_creation(self._again(self._api.whoami))
                return
            self._again(lambda: self._api.auth_check(self.repo, write=True))
        self._check_privacy(info)

    def _complete_name(self) -> None:
        """A name without an owner is one of the token's own account."""
        if "/" not in self.repo:
            self.repo = f"{self._api.whoami()['name']}/{self.repo}"

    def _info(self) -> Any:
        """The repository's state, or None where there is none that this token may see."""
        try:
            return self._api.model_info(self.repo, timeout=CALL_SECONDS)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None

    def _check_privacy(self, info: Any) -> None:
        if self.private and not info.private:
            raise TrainerError(
                FailureClass.BAD_SPEC,
                f"The repository {self.repo} is public, and publish.private is true: make it private at "
                f"{constants.ENDPOINT}/{self.repo}/settings, or set publish.private to false.",
                "publish.private",
            )

    def _check_creation(self, account: Mapping[str, Any]) -> None:
        """Whether the account may make this repository, as far as `whoami` tells."""
        namespace = self.repo.partition("/")[0]
        orgs = {org["name"] for org in account.get("orgs", [])}
        if namespace != account["name"] and namespace not in orgs:
            raise self._no_access(
                f"There is no repository {self.repo}, and the account {account['name']} cannot create one in "
                f"{namespace}: use a name under {account['name']}, or ask to join {constants.ENDPOINT}/{namespace}."
            )
        token = account.get("auth", {}).get("accessToken", {})
        fine = token.get("fineGrained", {}).get("scoped", [])
        may = any(
            s.get("entity", {}).get("name") == namespace and "repo.write" in s.get("permissions", []) for s in fine
        )
        if token.get("role") == "read" or (token.get("role") == "fineGrained" and not may):
            raise self._no_access(
                f"The token has no write access to {namespace}: create one with write access at "
                f"{constants.ENDPOINT}/settings/tokens."
            )

    # -- the upload ---------------------------------------------------------------------------------------------

    def push(self, files: Mapping[str, Path | bytes], message: str) -> Pushed:
        """Make the repository hold these files (by name), in one commit. The same files again give the same commit.

        Raises TrainerError: no-access, bad-spec (public where it has to be private), hub-unavailable.
        """
        with self._explained():
            self._again(self._complete_name)
            commit = self._again(lambda: self._push_once(files, message))
        return Pushed(commit, f"{constants.ENDPOINT}/{self.repo}/tree/{commit}")

    def _push_once(self, files: Mapping[str, Path | bytes], message: str) -> str:
        info = self._info()
        if info is None:
            self._api.create_repo(self.repo, private=self.private, exist_ok=True)
            info = self._info()
            if info is None:
                raise self._no_access(f"The repository {self.repo} could not be created with this token.")
        self._check_privacy(info)
        operations: list[Any] = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in files.items()]
        present = [sibling.rfilename for sibling in info.siblings or []]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale_files(present, files)]
        made = self._api.create_commit(self.repo, operations, commit_message=message)
        self._verify(str(made.oid), files)
        return str(made.oid)

    def _verify(self, commit: str, files: Mapping[str, Path | bytes]) -> None:
        """Compare what the Hub says it holds with what was meant to be there."""
        entries = self._api.list_repo_tree(self.repo, recursive=True, revision=commit)
        held = {e.path: (e.lfs.sha256 if e.lfs else e.blob_id) for e in entries if isinstance(e, RepoFile)}
        for name, content in files.items():
            if held.get(name) not in (digest(content, "sha256"), digest(content, "git")):
                raise TrainerError(
                    FailureClass.HUB_UNAVAILABLE,
                    f"{name} on {self.repo} at {commit} differs from what was uploaded.",
                    "publish",
                )

    # -- faults -------------------------------------------------------------------------------------------------

    def _again(self, call: Callable[[], Any]) -> Any:
        """The call's result, tried again where the Hub was busy, ill or cut off."""
        for number in range(1, TRIES + 1):
            try:
                return call()
            except Exception as error:
                root = root_of(error)
                if number == TRIES or not _may_pass(root):
                    raise
                pause = _pause(root, number)
                log.warning("the Hub answered %s; retrying in %.0f s", _answer(root), pause)
                time.sleep(pause)
        raise AssertionError("the loop returns or raises")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TrainerError:
            raise
        except CLIENT_ERRORS as error:
            raise self._explain(root_of(error)) from error

    def _explain(self, error: BaseException) -> TrainerError:
        page = f"{constants.ENDPOINT}/{self.repo}"
        status = status_of(error)
        if isinstance(error, DisabledRepoError):
            return self._no_access(f"The repository {self.repo} was disabled on the Hub: see {page}.")
        if isinstance(error, GatedRepoError):
            return self._no_access(f"The repository {self.repo} is gated for this token: ask for access at {page}.")
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            return TrainerError(
                FailureClass.NO_ACCESS,
                f"The Hub rejected the token for {self.repo}: create one with write access at "
                f"{constants.ENDPOINT}/settings/tokens.",
                "credentials.publish",
            )
        if status == 403 or isinstance(error, RepositoryNotFoundError):
            return self._no_access(
                f"The token has no write access to {self.repo}: give it write access at "
                f"{constants.ENDPOINT}/settings/tokens, or ask the owner for access at {page}."
            )
        if isinstance(error, HFValidationError):
            return TrainerError(
                FailureClass.BAD_SPEC, f"{self.repo!r} is not a valid repository name: {error}", "publish.repo"
            )
        if _may_pass(error) or isinstance(error, OfflineModeIsEnabled):
            return TrainerError(
                FailureClass.HUB_UNAVAILABLE,
                f"The upload to {self.repo} failed ({_answer(error)} after {TRIES} tries). The model is kept in the "
                "run directory and is uploaded when this stage runs again.",
                "publish.repo",
            )
        if status is not None:
            return self._no_access(f"The Hub refused the upload to {self.repo} (status {status}): {first_line(error)}")
        raise error

    def _no_access(self, sentence: str) -> TrainerError:
        return TrainerError(FailureClass.NO_ACCESS, sentence, "publish.repo")


def stale_files(present: Sequence[str], files: Mapping[str, Any]) -> list[str]:
    """Weights and configs at the top of the repository that would be loaded instead of, or beside, the new ones."""
    top = [name for name in present if "/" not in name and name not in files]
    return [name for name in top if name.endswith(MODEL_FILES) or name in MODEL_CONFIGS]


def digest(content: Path | bytes, kind: str) -> str:
    """sha256 (`sha256`, the id of an LFS file) or git's blob id (`git`) of a file."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    whole = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        whole.update(content)
        return whole.hexdigest()
    with content.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
    return whole.hexdigest()


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, TrainerError | RepositoryNotFoundError):
        return False
    status = status_of(error)
    if status is not None:
        return status in AGAIN_STATUS
    return isinstance(error, httpx2.HTTPError | ConnectionError | TimeoutError) or _of_xet(error)


def _of_xet(error: BaseException) -> bool:
    """The faster upload fails with plain RuntimeErrors in its own words."""
    return isinstance(error, RuntimeError) and re.search(r"\b(xet|cas)\b|data processing", str(error), re.I) is not None


def _answer(error: BaseException) -> str:
    status = status_of(error)
    return f"status {status}" if status is not None else type(error).__name__


def _pause(error: BaseException, number: int) -> float:
    """Seconds to wait: what the Hub asks for, else 2, 4, 8, …"""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    seconds = float(asked) if asked.isdigit() else 2.0**number
    return min(seconds, LONGEST_PAUSE_SECONDS)
