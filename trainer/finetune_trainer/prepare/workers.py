"""Work on many rows: in this process, and in several as soon as there are rows enough to pay for starting them."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

from finetune_trainer.startup import hidden_packages, hide_packages

Row = TypeVar("Row")
Result = TypeVar("Result")

PARALLEL_ROWS = 50_000
"""Rows from which on processes are started: each takes some seconds to import its libraries."""
MOST_WORKERS = 4
CHUNK_ROWS = 256
AHEAD = 3
"""Chunks per process that are read ahead."""


class Workers:
    """Processes that carry out one task after the other. Used with `with`, at whose end they end."""

    def __init__(self, count: int | None = None) -> None:
        """`count`: processes at most; as many as processors where left out, and 1 is this process alone."""
        self.count = min(len(os.sched_getaffinity(0)), MOST_WORKERS) if count is None else count
        self._pool: ProcessPoolExecutor | None = None

    @property
    def started(self) -> bool:
        """Whether there are other processes."""
        return self._pool is not None

    def carry_out(
        self, task: Callable[[list[Row]], Result], rows: Iterable[Row], expected: int = 0
    ) -> Iterator[Result]:
        """What the task makes of each chunk of the rows, in their order, with a few chunks in memory at most.

        task: goes to each process once, so it can be pickled; expected: how many rows there are, where it is known.
        """
        source = iter(rows)
        chunks = iter(lambda: list(islice(source, CHUNK_ROWS)), [])
        while self.count < 2 or (not self.started and expected < PARALLEL_ROWS):
            chunk = next(chunks, None)
            if chunk is None:
                return
            yield task(chunk)
            expected += len(chunk)
        yield from self._spread(task, chunks)

    def _spread(self, task: Callable[[list[Row]], Result], chunks: Iterator[list[Row]]) -> Iterator[Result]:
        if self._pool is None:
            # Spawned, not forked: the tokenizer and the reporter hold threads.
            spawn = get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.count, spawn, initializer=hide_packages, initargs=(hidden_packages(),)
            )
        running: deque[Future[Result]] = deque()
        with TemporaryDirectory(prefix="finetune-") as folder:
            place = Path(folder) / "task"
            place.write_bytes(pickle.dumps(task))
            for chunk in chunks:
                running.append(self._pool.submit(_carry_out, str(place), chunk))
                if len(running) == AHEAD * self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def _task(place: str) -> Callable[[list[Any]], Any]:
    task: Callable[[list[Any]], Any] = pickle.loads(Path(place).read_bytes())
    return task


def _carry_out(place: str, chunk: list[Any]) -> Any:
    return _task(place)(chunk)
