"""Regular expressions of users, on an engine whose time is linear in the text (RE2): none can hold up a process."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import re2

NAMES = re.compile(r"[A-Za-z0-9_]+(\s*,\s*[A-Za-z0-9_]+)*")
"""Names separated by commas, which are not taken for a regular expression."""


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 8 << 20
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"is not a regular expression of RE2's syntax, which has no look-around: {reason}") from None


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches the whole of a name. Raises ValueError if it is not one."""
    matched: bool = _compiled(pattern).fullmatch(name) is not None
    return matched


def check_module_pattern(pattern: str) -> str:
    """The pattern, if it is a list of names or a regular expression. Raises ValueError otherwise."""
    if NAMES.fullmatch(pattern) is None and pattern != "all-linear":
        _compiled(pattern)
    return pattern
