"""What commands are given to read: one place for the ways in which a file is none."""

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
        raise UserError(f"There is no file {file}.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a directory: name the file in it.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source_name(file)} is not text in UTF-8 (byte {error.start}).") from None


def source_name(file: str) -> str:
    """How messages call it."""
    return "stdin" if file == STDIN else file
