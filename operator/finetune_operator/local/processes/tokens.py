"""The user's tokens for the stages: read from the environment, passed on as files, to one program at a time.

They never appear on a command line, in a child's environment, in a log or in the run directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.runconfig import TokenKind

SECRET_VARIABLES = (
    "HF_TOKEN",
    "HF_PUBLISH_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_TOKEN",
    "HUGGINGFACEHUB_API_TOKEN",
    "HF_TOKEN_PATH",
    "WANDB_API_KEY",
)
"""Removed from every child's environment."""
_PREFIX = "finetune-tokens-"


@dataclass(frozen=True)
class Tokens:
    """The user's tokens; shown nowhere, not even by repr."""

    values: Mapping[TokenKind, str] = field(default_factory=dict, repr=False)
    borrowed: bool = False
    """`publish` is the read token, because there was no HF_PUBLISH_TOKEN."""

    def version(self, uid: str) -> str:
        """Changes when a token changes, and reveals nothing of it: salted with the job's uid, and truncated."""
        text = "\n".join(f"{kind}={value}" for kind, value in sorted(self.values.items()))
        return hashlib.sha256(f"{uid}\n{text}".encode()).hexdigest()[:12]


def tokens_of(environ: Mapping[str, str]) -> Tokens:
    """HF_TOKEN (or the login that huggingface_hub saved), HF_PUBLISH_TOKEN (or HF_TOKEN), WANDB_API_KEY."""
    hub = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN") or _saved_login(environ)
    publish = environ.get("HF_PUBLISH_TOKEN") or hub
    found: dict[TokenKind, str] = {"hub": hub, "publish": publish, "wandb": environ.get("WANDB_API_KEY", "")}
    values = {kind: value.strip() for kind, value in found.items() if value.strip()}
    return Tokens(values, borrowed=bool(hub) and not environ.get("HF_PUBLISH_TOKEN"))


def _saved_login(environ: Mapping[str, str]) -> str:
    home = environ.get("HF_HOME") or f"{environ.get('HOME', '~')}/.cache/huggingface"
    path = Path(environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child: everything but the tokens."""
    return {name: value for name, value in environ.items() if name not in SECRET_VARIABLES}


def write_tokens(tokens: Tokens, kind: TokenKind | None) -> Path:
    """A new directory, for this user alone, that holds the token of that kind if there is one."""
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if kind is not None and kind in tokens.values:
        descriptor = os.open(directory / kind, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(tokens.values[kind])
    return directory


def remove_tokens(directory: str) -> None:
    """Remove what `write_tokens` made; a path that only claims to be such a directory is left alone."""
    path = Path(directory)
    if not path.name.startswith(_PREFIX) or path.parent != Path(tempfile.gettempdir()):
        return
    with contextlib.suppress(OSError):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
