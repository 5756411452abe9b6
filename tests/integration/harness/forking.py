"""Operators as processes that are forked from one that has imported everything: a start costs no seconds of imports."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.support.forked_operator import operate

_FORKING = multiprocessing.get_context("forkserver")
_FORK_SERVER_IMPORTS = ["pytest", "tests.support.forked_operator"]


def fork_operator(environment: Mapping[str, str], log: Path, tuned: Mapping[str, float]) -> ForkServerProcess:
    """Start `finetune operator` in that environment; `tuned` changes constants of it (seconds) by their names."""
    # The server is one for the whole process: said here, and not at import, this is what its first user wants.
    _FORKING.set_forkserver_preload(_FORK_SERVER_IMPORTS)
    process = _FORKING.Process(target=operate, args=(dict(environment), str(log), dict(tuned)), daemon=True)
    process.start()
    return process
