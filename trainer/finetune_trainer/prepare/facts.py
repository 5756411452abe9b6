"""What the report and the manifest say of the prepared data."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune_api.report import DatasetFacts, LengthFacts
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.examples import UNANSWERABLE
from finetune_trainer.data.manifest import PreparedDataset, PreparedManifest, Span
from finetune_trainer.prepare.mixture import UNSEEN_HALF, SplitAssignment
from finetune_trainer.prepare.rendering import RowCounts
from finetune_trainer.reporter import Reporter
from finetune_trainer.versions import versions

FACTS_FILE = "facts.json"
FACTS = ("model", "lengths", "datasets", "origin", "choices", "warnings")
"""Fields of the report that Prepare fills."""


def prepared_dataset(assignment: SplitAssignment, written: RowCounts) -> PreparedDataset:
    """The manifest's line of one dataset."""
    spec = assignment.reader.spec
    return PreparedDataset(
        index=assignment.reader.index,
        name=spec.name,
        task=assignment.reader.task,
        labels=list(assignment.labels),
        source=assignment.reader.source.origin,
        train=written.train,
        validation=written.validation,
        test=written.scored,
        evaluation_split=assignment.evaluation,
        weight=spec.weight,
        loss_weight=spec.loss_weight,
        notes=data_notes(assignment),
    )


def evaluation_split(assignments: list[SplitAssignment]) -> str:
    """Which rows are scored, with the datasets' names where they differ."""
    kinds = {assignment.evaluation for assignment in assignments}
    if len(kinds) == 1:
        return kinds.pop()
    return ", ".join(f"{assignment.evaluation} ({assignment.reader.name})" for assignment in assignments)


def span(store: DocumentStore) -> Span:
    """Totals of a store."""
    longest = int(store.lengths.max()) if len(store) else 0
    return Span(documents=len(store), tokens=len(store.ids), labelled=len(store.target_id), longest=longest)


def report_split(
    reporter: Reporter, assignments: list[SplitAssignment], manifest: PreparedManifest, *, selects_checkpoint: bool
) -> None:
    """Warnings and choices that follow from the split. selects_checkpoint: by validation."""
    for assignment in assignments:
        for sentence in assignment.warnings:
            reporter.warn(f"{sentence}.")
        foreign = sum(scan.counts.foreign for scan in assignment.scans.values())
        if foreign:
            reporter.warn(f"{foreign:,} rows of {assignment.reader.name} are not valid UTF-8; decoded as Windows-1252.")
        if assignment.evaluation == "none":
            reporter.warn(
                f"No rows of {assignment.reader.name} are held out, so it cannot be evaluated: "
                "set split.validation, split.test or datasets[].splits."
            )
    if UNSEEN_HALF in {assignment.evaluation for assignment in assignments}:
        reporter.choose(
            "evaluationSplit",
            manifest.evaluation_split,
            "a checkpoint is selected on the validation rows (keepBest or earlyStopping): half of them stay unseen",
        )
    if not manifest.validation.documents and selects_checkpoint:
        reporter.warn("There are no validation rows, so the last checkpoint is exported instead of the best one.")


def data_notes(assignment: SplitAssignment) -> list[str]:
    """What was chosen for a dataset and found in it, in sentences: known before a row is rendered."""
    scans, evaluation = assignment.scans.values(), assignment.evaluation
    filtered = sum(scan.counts.filtered for scan in scans)
    unanswerable = sum(scan.counts.unanswerable for scan in scans)
    marked = sum(scan.counts.marked for scan in scans)
    mark = next((scan.counts.mark for scan in scans if scan.counts.mark), "")
    left_out = assignment.count("left out") + assignment.count("excluded")
    split = evaluation if evaluation == UNSEEN_HALF else f"{evaluation} split"
    return [
        *assignment.reader.source.notes,
        *assignment.reader.notes,
        *([f"{filtered:,} rows removed by the filter"] if filtered else []),
        *([f"{left_out:,} rows not drawn (maxRows)"] if left_out else []),
        *(
            [f"{unanswerable:,} questions have no answer: the model learns to say {UNANSWERABLE!r}"]
            * bool(unanswerable)
        ),
        *([f"{marked:,} texts hold marks such as {mark}, {_marks_are(assignment)}"] if marked else []),
        *([f"evaluated on the {split}"] if evaluation != "none" else []),
        *assignment.notes,
    ]


def _marks_are(assignment: SplitAssignment) -> str:
    if assignment.reader.spec.special_tokens == "control":
        return "read as special tokens where the tokenizer has them (specialTokens: control)"
    return "read letter by letter as any other text; if they are special tokens, set specialTokens: control"


def dataset_facts(assignment: SplitAssignment, written: RowCounts, most: int) -> DatasetFacts:
    """The report's line of one dataset. most: tokens of a document at most."""
    scans = assignment.scans.values()
    bad = sum(scan.bad.count for scan in scans) + written.bad.count
    first = [line for scan in scans for line in scan.bad.first] + written.bad.first
    drawn = assignment.scored is not None
    notes = [
        *data_notes(assignment),
        *([f"{bad:,} unusable rows: {'; '.join(first[:3])}{'; …' if bad > 3 else ''}"] if bad else []),
        *([f"{written.scored:,} rows drawn for evaluation (evaluation.maxRows)"] if drawn else []),
        *written.notes(most),
    ]
    return DatasetFacts(
        name=assignment.reader.name,
        source=assignment.reader.source.origin,
        rows=sum(len(scan) for scan in scans) - written.bad.count,
        bad_rows=bad,
        train=written.train,
        validation=written.validation,
        test=written.scored,
        labels=len(assignment.labels) or None,
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
