"""Input files of the commands, and everything that can be wrong with one."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune_operator.errors import UserError

STDIN = "-"


def read_text(file: str) -> str:
    """The text of a file, or of standard input for `-`. Raises UserError with a sentence if there is none."""
    try:
        data = sys.stdin.buffer.read() if file == STDIN else Path(file).expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(f"File {file} does not exist.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a directory; pass a file.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source_name(file)} is not valid UTF-8 (byte {error.start}).") from None


def source_name(file: str) -> str:
    """Its name in messages."""
    return "stdin" if file == STDIN else file
