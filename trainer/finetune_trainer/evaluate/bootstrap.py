"""Paired percentile bootstrap over rows (Efron & Tibshirani, An Introduction to the Bootstrap, chapters 13 and 14).

Every metric is a function of sums over rows, so one resample is a vector of row counts and all resamples are one
matrix product. Base and tuned see the same resampled rows: the interval is that of the paired difference.
`scipy.stats.bootstrap` gives the same intervals 18 times slower for macro-F1 of 77 labels: it gathers every resample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from finetune_api.report import Interval
from finetune_trainer.evaluate.metrics import Measure

Float64 = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 20_240_501
CHUNK_VALUES = 4_000_000
"""Counts held at once, so that memory does not grow with resamples times rows."""
STATEMENT = f"95% paired percentile bootstrap intervals over rows, {RESAMPLES:,} resamples"


def resampled_values(measures: Sequence[Measure], seed: int, resamples: int = RESAMPLES) -> list[Float64]:
    """Values of measures over the same rows, on the same resamples of those rows.

    Returns one float64[resamples] a measure. All measures must have the same number of rows n > 0.
    """
    rows = len(measures[0].statistics)
    results = [np.empty(resamples) for _ in measures]
    start = 0
    for counts in _counts(rows, seed, resamples):
        stop = start + len(counts)
        for result, measure in zip(results, measures, strict=True):
            result[start:stop] = measure.finish(counts @ measure.statistics)
        start = stop
    return results


def _counts(rows: int, seed: int, resamples: int) -> Iterator[Float64]:
    """How often each row is drawn: float64[chunk, rows], rows summing to `rows`."""
    random = np.random.default_rng(seed)
    chunk = max(1, CHUNK_VALUES // rows)
    for start in range(0, resamples, chunk):
        drawn = random.integers(0, rows, size=(min(chunk, resamples - start), rows))
        offsets = np.arange(len(drawn))[:, None] * rows
        flat = np.bincount((drawn + offsets).ravel(), minlength=len(drawn) * rows)
        yield flat.reshape(len(drawn), rows).astype(np.float64)


def interval(value: float, resampled: Float64) -> Interval:
    """The central 95% of the resampled values around the estimate."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))
