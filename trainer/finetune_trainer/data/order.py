"""Which examples each optimiser step sees: a pure function of (seed, epoch, step), the same for every number of
ranks, size of micro-batch and attempt. Nothing about it needs to be stored in a checkpoint but the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.mixing import Int64, epoch_examples, examples_per_epoch, generator


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """`ceil(examples / batch_size)`: the last step of an epoch takes what is left, and is a mean over that."""
    return -(-examples // batch_size)


@dataclass(frozen=True, eq=False)
class ExampleSampler:
    """The examples of every step."""

    documents: tuple[Int64, ...]
    """Indices in the store of each dataset's documents."""
    weights: tuple[float, ...]
    """Examples an epoch of each dataset as a multiple of its documents."""
    batch_size: int
    """Examples per step."""
    seed: int

    @classmethod
    def of(cls, dataset: NDArray[np.int16], weights: Sequence[float], batch_size: int, seed: int) -> ExampleSampler:
        """The order over a store whose document i belongs to `dataset[i]`."""
        documents = tuple(np.flatnonzero(dataset == d) for d in range(len(weights)))
        return cls(documents, tuple(weights), batch_size, seed)

    @property
    def examples(self) -> int:
        """Examples of one epoch."""
        rows = zip(self.documents, self.weights, strict=True)
        return sum(examples_per_epoch(len(documents), weight) for documents, weight in rows)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(self.examples, self.batch_size)

    def step(self, step: int) -> Int64:
        """Indices in the store int64[<= batch_size] of the examples of optimiser step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return _epoch(self, epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def epochs_done(self, steps: int) -> float:
        """Passes over the mixture after `steps` steps."""
        epoch, within = divmod(steps, self.steps_per_epoch)
        return epoch + min(1.0, within * self.batch_size / self.examples)


@lru_cache(maxsize=4)
def _epoch(order: ExampleSampler, epoch: int) -> Int64:
    """All examples of one epoch, mixed."""
    parts = [
        documents[epoch_examples(len(documents), weight, epoch, order.seed, d)]
        for d, (documents, weight) in enumerate(zip(order.documents, order.weights, strict=True))
        if len(documents)
    ]
    examples = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return examples[generator("order", order.seed, epoch).permutation(len(examples))]
