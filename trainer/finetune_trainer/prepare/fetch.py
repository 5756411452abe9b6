"""The datasets of a job on this machine, from the Hub or a path, their columns found."""

from __future__ import annotations

from finetune_api.report import Progress
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import RunContext
from finetune_trainer.prepare.dataset_files import choose_files
from finetune_trainer.prepare.hub import Hub
from finetune_trainer.prepare.readme import Head
from finetune_trainer.prepare.scan import DatasetReader, open_reader
from finetune_trainer.prepare.sources import DatasetSource, open_path, open_source

CONVERTED_REVISION = "refs/convert/parquet"
"""Where the Hub keeps Parquet files of datasets that only a script can load."""


def hub_of(context: RunContext) -> Hub:
    """The Hub with this stage's token, telling its bytes to the report."""

    def progress(done: int, total: int) -> None:
        context.reporter.progress(Progress(step=done, total=total, unit="bytes"))

    return Hub(context.token("hub"), context.cache / "hub", progress)


def open_datasets(context: RunContext, spec: FineTuneJobSpec, hub: Hub) -> list[DatasetReader]:
    """Every dataset on this machine, its columns found. Raises TrainerError as the parts do."""
    dataset_readers = []
    for index, dataset in enumerate(spec.datasets):
        field = f"datasets[{index}]"
        if dataset.path is not None:
            path = context.resolve_source(dataset.path, f"{field}.path")
            source = open_path(path, dataset.path, dataset.config, field)
        else:
            source = _open_repo(hub, str(dataset.repo), dataset.revision, dataset.config, field)
        dataset_readers.append(open_reader(dataset, index, source))
    return dataset_readers


def _open_repo(hub: Hub, repo: str, revision: str, config: str | None, field: str) -> DatasetSource:
    resolved = hub.resolve(repo, revision, "dataset", field)
    names = [file.name for file in resolved.files]
    notes: tuple[str, ...] = ()
    script = f"{repo.rpartition('/')[2]}.py"
    if script in names and revision == "main":
        # The rows are where the script would fetch them; the Hub's own conversion holds them as files.
        resolved = hub.resolve(repo, CONVERTED_REVISION, "dataset", field)
        names = [file.name for file in resolved.files]
        notes = (f"read from the Hub's Parquet files ({CONVERTED_REVISION}), as the repository has a loading script",)
    head = Head()
    if "README.md" in names:
        head = Head.read(hub.download(resolved, ["README.md"], field))
    files, chosen = choose_files(names, head, config, field)
    root = hub.download(resolved, [name for members in files.values() for name in members], field)
    return open_source(root, files, head.class_names(chosen), f"{repo}@{resolved.commit}", notes)
