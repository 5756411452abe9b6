"""Rows rendered and tokenised in their order, by several processes where there are enough rows to pay for them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context

from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.data.examples import BadRowError, Example
from finetune_trainer.data.render import FewShot, Rendered, Rendering, render_evaluation, render_training

PARALLEL_ROWS = 100_000
"""Rows of a dataset from which on processes are started: each takes some ten seconds to import its libraries."""
MOST_WORKERS = 4
CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Order:
    """One row and what is wanted of it."""

    example: Example
    place: str
    """`train.csv, row 12`."""
    documents: bool
    """Whether it is trained on or validated with."""
    scored: bool
    """Whether Evaluate scores it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row."""

    rendered: Rendered | None = None
    rows: list[EvaluationRow] = field(default_factory=list)
    problem: str = ""
    """Why the row cannot be used; empty where it can."""


@dataclass(frozen=True)
class Renderer:
    """How every row of one dataset is rendered; goes to each worker once."""

    how: Rendering
    dataset: str
    answer_tokens: int
    shots: FewShot | None

    def render(self, order: Order) -> Outcome:
        """Render one row. Pure: the same in every process."""
        try:
            rows = []
            if order.scored:
                rows = render_evaluation(
                    self.how, order.example, self.dataset, answer_tokens=self.answer_tokens, few_shot=self.shots
                )
            rendered = render_training(self.how, order.example) if order.documents else None
        except BadRowError as error:
            return Outcome(problem=str(error))
        return Outcome(rendered, rows)


def worker_count(rows: int) -> int:
    """Processes for a dataset of so many rows; 1 is this process alone."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS) if rows >= PARALLEL_ROWS else 1


def render_all(renderer: Renderer, orders: Iterable[Order], workers: int) -> Iterator[tuple[Order, Outcome]]:
    """(order, outcome) in the order given, with at most a few chunks of rows in memory."""
    if workers < 2:
        yield from ((order, renderer.render(order)) for order in orders)
        return
    source = iter(orders)
    running: deque[tuple[list[Order], Future[list[Outcome]]]] = deque()
    # Spawned, not forked: the tokenizer and the reporter hold threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(renderer,)) as pool:
        while True:
            while len(running) < 3 * workers and (chunk := list(islice(source, CHUNK_ROWS))):
                running.append((chunk, pool.submit(_render_chunk, chunk)))
            if not running:
                return
            given, future = running.popleft()
            yield from zip(given, future.result(), strict=True)


_renderer: Renderer | None = None


def _begin(renderer: Renderer) -> None:
    global _renderer
    _renderer = renderer


def _render_chunk(orders: list[Order]) -> list[Outcome]:
    if _renderer is None:
        raise RuntimeError("a worker was given rows before it was told how to render them")
    return [_renderer.render(order) for order in orders]
