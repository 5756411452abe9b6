"""What Prepare found, as the report and the manifest say it."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune_api.report import DatasetFacts, LengthFacts
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.manifest import PreparedDataset, PreparedManifest, Span
from finetune_trainer.prepare.mixture import UNSEEN_HALF, Division
from finetune_trainer.prepare.rendering import Written
from finetune_trainer.reporter import Reporter
from finetune_trainer.versions import versions

FACTS_FILE = "facts.json"
FACTS = ("model", "lengths", "datasets", "origin", "choices", "warnings")
"""Fields of the report that Prepare fills."""


def prepared_dataset(division: Division, written: Written) -> PreparedDataset:
    """The manifest's line of one dataset."""
    spec = division.reading.spec
    return PreparedDataset(
        index=division.reading.index,
        name=spec.name,
        task=division.reading.task,
        labels=list(division.labels),
        source=division.reading.source.origin,
        train=written.train,
        validation=written.validation,
        test=written.scored,
        evaluation_split=division.evaluation,
        weight=spec.weight,
        loss_weight=spec.loss_weight,
    )


def evaluation_split(divisions: list[Division]) -> str:
    """Which rows are scored, with the datasets' names where they differ."""
    kinds = {division.evaluation for division in divisions}
    if len(kinds) == 1:
        return kinds.pop()
    return ", ".join(f"{division.evaluation} ({division.reading.name})" for division in divisions)


def span(store: DocumentStore) -> Span:
    """Totals of a store."""
    longest = int(store.lengths.max()) if len(store) else 0
    return Span(documents=len(store), tokens=len(store.ids), labelled=len(store.target_id), longest=longest)


def say(reporter: Reporter, divisions: list[Division], manifest: PreparedManifest, *, selects: bool) -> None:
    """Warnings and choices that follow from the division. selects: training picks a checkpoint by validation."""
    for division in divisions:
        for sentence in division.warnings:
            reporter.warn(f"{sentence}.")
        foreign = sum(scan.foreign for scan in division.scans.values())
        if foreign:
            reporter.warn(
                f"{foreign} rows of {division.reading.name} are not UTF-8: their odd bytes were read as Windows-1252."
            )
        if division.evaluation == "none":
            reporter.warn(
                f"Nothing of {division.reading.name} is held out, so nothing can be measured on it: "
                "set split.validation, split.test or datasets[].splits."
            )
    if UNSEEN_HALF in {division.evaluation for division in divisions}:
        reporter.choose(
            "evaluationSplit",
            manifest.evaluation_split,
            "a checkpoint is chosen on the validation rows (keepBest or earlyStopping), so half of them is kept unseen",
        )
    if not manifest.validation.documents and selects:
        reporter.warn("There are no validation rows: the last checkpoint is exported, not the best one.")


def dataset_facts(division: Division, written: Written, most: int) -> DatasetFacts:
    """The report's line of one dataset. most: tokens of a document at most."""
    scans = division.scans.values()
    bad = sum(scan.bad.count for scan in scans) + written.bad.count
    first = [line for scan in scans for line in scan.bad.first] + written.bad.first
    left_out = division.count("left out") + division.count("excluded")
    filtered = sum(scan.filtered for scan in scans)
    notes = [
        *division.reading.source.notes,
        *([f"the filter left out {filtered} rows"] if filtered else []),
        *([f"maxRows left out {left_out} rows"] if left_out else []),
        *([f"{bad} rows cannot be used: {'; '.join(first[:3])}{'; …' if bad > 3 else ''}"] if bad else []),
        *([f"evaluation.maxRows draws {written.scored} rows"] if division.scored is not None else []),
        *([f"measured on the {division.evaluation}"] if division.evaluation != "none" else []),
        *division.notes,
        *written.notes(most),
    ]
    return DatasetFacts(
        name=division.reading.name,
        source=division.reading.source.origin,
        rows=sum(len(scan) for scan in scans) - written.bad.count,
        bad_rows=bad,
        train=written.train,
        validation=written.validation,
        test=written.scored,
        labels=len(division.labels) or None,
        notes=notes,
    )


def length_facts(store: DocumentStore, datasets: list[PreparedDataset]) -> LengthFacts:
    """Documents and tokens of one epoch of the mixture: round(weight × documents) of each dataset."""
    documents, tokens, labelled = 0, 0.0, 0.0
    lengths, targets = store.lengths, store.target_counts
    for dataset in datasets:
        mine = np.asarray(store.dataset) == dataset.index
        count = int(mine.sum())
        drawn = round(dataset.weight * count)
        documents += drawn
        tokens += float(lengths[mine].sum()) * drawn / max(count, 1)
        labelled += float(targets[mine].sum()) * drawn / max(count, 1)
    return LengthFacts(
        documents=documents, tokens=round(tokens), longest=int(lengths.max(initial=0)), labelled=round(labelled)
    )


def origin_of(manifest: PreparedManifest, seed: int) -> dict[str, Any]:
    """Where model and data come from, to the commit or digest, and what computed the rest."""
    model = manifest.model
    origin: dict[str, Any] = {
        "model": f"{model.source}@{model.commit}" if model.commit else f"{model.source} sha256:{model.digest}",
        "datasets": {dataset.name: dataset.source for dataset in manifest.datasets},
        "configDigest": manifest.config_digest,
        "versions": versions(),
        "seed": seed,
    }
    return origin | ({"adapter": model.adapter_source} if model.adapter_source else {})
