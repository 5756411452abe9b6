"""Errors of the command line: one sentence and an exit code, no traceback."""

from __future__ import annotations

import os
import sys

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_BAD_SPEC = 2
EXIT_GATE_REFUSED = 3
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something that the user can fix. Any command may raise it; the edge prints the sentence.

    `sentence` says what is wrong, where, and what to do; `exit_code` is that of the process (2: bad input).
    """

    def __init__(self, sentence: str, exit_code: int = EXIT_BAD_SPEC) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.exit_code = exit_code


def debugging() -> bool:
    """Whether `--debug` was given: show tracebacks and the trainer's own log."""
    return os.environ.get("FINETUNE_DEBUG") == "1"


def say_error(sentence: str) -> None:
    """Print one line to stderr, red on a terminal with colours."""
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    mark = "\x1b[1;31merror:\x1b[0m" if red else "error:"
    print(f"{mark} {sentence}", file=sys.stderr)
