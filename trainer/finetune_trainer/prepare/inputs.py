"""The datasets of a job on this machine, from the paths that it names or as they were fetched."""

from __future__ import annotations

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import RunContext
from finetune_trainer.prepare.fetched import Fetched
from finetune_trainer.prepare.readme import Head
from finetune_trainer.prepare.scan import DatasetReader, open_reader
from finetune_trainer.prepare.sources import DatasetSource, open_path, open_source


def open_datasets(context: RunContext, spec: FineTuneJobSpec, fetched: Fetched) -> list[DatasetReader]:
    """Every dataset, its columns found. Raises TrainerError as the parts do."""
    readers = []
    for index, dataset in enumerate(spec.datasets):
        field = f"datasets[{index}]"
        if dataset.path is not None:
            path = context.resolve_source(dataset.path, f"{field}.path")
            source = open_path(path, dataset.path, dataset.config, field)
        else:
            source = _open_fetched(context, fetched, field)
        readers.append(open_reader(dataset, index, source))
    return readers


def _open_fetched(context: RunContext, fetched: Fetched, field: str) -> DatasetSource:
    found = fetched.repository(field)
    root = context.cache / found.directory
    names = Head.read(root).class_names(found.config) if "README.md" in found.files else {}
    return open_source(root, found.splits, names, f"{found.repo}@{found.commit}", tuple(found.notes))
