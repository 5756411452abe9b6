"""Errors as values: class, field and a sentence, raised where the facts are and shown at the edge.

`TrainerError` is raised for everything that the user's input or environment caused; `classify` turns any exception
into the `Failure` on which the operator decides. No secret may enter a sentence.
"""

from __future__ import annotations

import base64
import errno
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, quote_plus

from finetune_api.report import Failure, FailureClass

MAX_SENTENCE = 1500

_PEER_GONE = re.compile(
    r"connection (closed|reset|refused)|peer|broken pipe|socket timeout|store.*(timeout|timed out)"
    r"|NCCL (error|communicator was aborted)|remote process exited|Timed out waiting|\bgloo\b",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|Bearer\s+\S+|wandb_v1_[A-Za-z0-9_]+)")
_known_secrets: set[str] = set()


class TrainerError(Exception):
    """A failure with its class, the spec's field that caused it and a sentence that says what to do."""

    def __init__(self, failure_class: FailureClass, sentence: str, field: str = "") -> None:
        super().__init__(sentence)
        self.failure_class = failure_class
        self.sentence = sentence
        self.field = field

    def __reduce__(self) -> tuple[type[TrainerError], tuple[FailureClass, str, str]]:
        return TrainerError, (self.failure_class, self.sentence, self.field)  # ranks send it to each other


def register_secret(value: str) -> None:
    """From now on, `redact` removes `value` from every text, as it is and as URLs and headers encode it."""
    if value:
        _known_secrets.update((value, quote(value, safe=""), quote_plus(value), *_in_base64(value)))


def _in_base64(value: str) -> Iterator[str]:
    """The characters of its base64 that do not depend on what stands before and after it, for each alignment."""
    data = value.encode()
    if len(data) < 8:  # too little would be left of it to be recognised
        return
    for before, undecided in ((0, 0), (1, 2), (2, 3)):
        padded = b"\0" * before + data
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(padded).decode()[undecided : len(padded) * 8 // 6]


def redact(text: str) -> str:
    """`text` without the secrets of this process, anything that looks like a token, and halves of characters."""
    for secret in sorted(_known_secrets, key=len, reverse=True):
        text = text.replace(secret, "[redacted]")
    return printable(_TOKEN.sub("[redacted]", text))


def printable(text: str) -> str:
    """`text` with halves of characters spelt out: names of files and texts may hold them, but no report can."""
    return text.encode("utf-8", "backslashreplace").decode()


def classify(error: BaseException, rank: int | None = None) -> Failure:
    """The failure that `error` means; an unknown exception is a crash with the exception's own message."""
    failure_class, sentence, field = _class_of(error)
    return Failure(
        failure_class=failure_class,
        sentence=redact(sentence)[:MAX_SENTENCE],
        field=printable(field),
        rank=rank,
        time=datetime.now(UTC),
    )


def _class_of(error: BaseException) -> tuple[FailureClass, str, str]:
    if isinstance(error, TrainerError):
        return error.failure_class, error.sentence, error.field
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return (
            FailureClass.STORAGE_FULL,
            f"No space left on the volume{where}. Enlarge it, or lower checkpoint.keep.",
            "storage.run.size",
        )
    if isinstance(error, MemoryError):
        limit = "podTemplate.resources.limits.memory (of Prepare and Publish: podTemplate.cpuResources.limits.memory)"
        return FailureClass.HOST_OOM, f"Out of host memory. Raise {limit}.", ""
    return _class_of_torch_error(error) or (FailureClass.CRASH, f"{type(error).__name__}: {error}".strip(": "), "")


def _class_of_torch_error(error: BaseException) -> tuple[FailureClass, str, str] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return FailureClass.CUDA_OOM, f"Out of GPU memory: {_first_line(error)}", "training"
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    of_a_collective = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)) is not None
    )
    if of_a_collective:
        return FailureClass.PEER, f"Lost the connection to another rank: {_first_line(error)}", ""
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def failure_file(logs: Path, rank: int) -> Path:
    """Where a failing rank leaves its failure on the volume."""
    return logs / f"failure-rank{rank}.json"


def root_cause(failures: list[Failure]) -> Failure | None:
    """The earliest failure that was not caused by another rank's."""
    own = [f for f in failures if f.failure_class is not FailureClass.PEER]
    return min(own or failures, key=lambda f: f.time, default=None)
