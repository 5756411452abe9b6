"""Datasets known by name: what their rows teach, which columns and splits to use, and how many rows there are.

A job may name one of these repositories and leave everything else out. Values only: the models that give
them meaning are in spec.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class KnownDataset:
    """One Hub dataset."""

    task: str
    """Value of `spec.Task`."""
    columns: Mapping[str, str]
    """`spec.Columns` to the dataset's own column names."""
    splits: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({"train": "train"}))
    """`spec.Splits` to the dataset's own split names."""
    rows: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Rows of each of the dataset's own splits, where they are known."""
    characters: int = 0
    """Typical characters of a rendered example, prompt and answer together; 0 where unknown."""


KNOWN_DATASETS: Mapping[str, KnownDataset] = MappingProxyType(
    {
        "infinite-dataset-hub/TextClaimsDataset": KnownDataset(
            task="classification",
            columns={"text": "text", "label": "label"},
            rows={"train": 100},  # about: all of that hub are generated and of this size
            characters=150,
        ),
        "PolyAI/banking77": KnownDataset(
            task="classification",
            columns={"text": "text", "label": "label"},
            splits={"train": "train", "test": "test"},
            rows={"train": 10_003, "test": 3_080},
            characters=1_930,  # the prompt names all 77 intents
        ),
        # The answers of its test split are not public: its validation split is what is held out to the end.
        "tau/commonsense_qa": KnownDataset(
            task="multiple-choice",
            columns={"question": "question", "choices": "choices", "answer": "answerKey"},
            splits={"train": "train", "test": "validation"},
            rows={"train": 9_741, "validation": 1_221, "test": 1_140},
            characters=190,
        ),
    }
)
