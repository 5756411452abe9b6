"""The program `fetch`: brings the files that a job needs from the Hub into the cache.

It alone has the read token, so it opens nothing of what it downloads but the YAML heads of dataset READMEs, which
name the files. Whatever parses models and data runs after it, without a token and without the Hub.
"""

from __future__ import annotations

from typing import Any

from finetune_api.report import Progress
from finetune_api.spec import Dataset
from finetune_trainer.context import RunContext
from finetune_trainer.prepare.dataset_files import choose_files, note_unused
from finetune_trainer.prepare.fetched import Fetched, FetchedRepo
from finetune_trainer.prepare.hub import Hub, ResolvedRepo
from finetune_trainer.prepare.model_files import ADAPTER_FILES, check_adapter_files, model_files
from finetune_trainer.prepare.readme import Head
from finetune_trainer.prepare.reuse import config_digest, is_prepared

CONVERTED_REVISION = "refs/convert/parquet"
"""Where the Hub keeps Parquet files of datasets that only a script can load."""
Wanted = tuple[ResolvedRepo, FetchedRepo]
"""A repository, and its entry of the hand-over."""


def run(context: RunContext) -> None:
    """Fetch what Prepare needs. Raises TrainerError with what is wrong and what to do."""
    _run(context, weights=True)


def run_for_preview(context: RunContext) -> None:
    """Fetch what `finetune preview` needs: everything but the model's weights. Raises TrainerError as `run`."""
    _run(context, weights=False)


def _run(context: RunContext, *, weights: bool) -> None:
    digest = config_digest(context.config)
    if is_prepared(context, digest):
        return
    context.take_fence()
    hub = _hub_of(context)
    context.reporter.activity("checking access to model and datasets")
    wanted = _choose(context, hub, weights=weights)
    for field, (resolved, entry) in wanted.items():
        context.reporter.activity(f"downloading {entry.repo}")
        hub.download(resolved, entry.names, field)
    context.check_fence()
    repos = {field: entry for field, (_, entry) in wanted.items()}
    Fetched(attempt=context.attempt.id, config_digest=digest, repos=repos).write(context.run)


def _hub_of(context: RunContext) -> Hub:
    """The Hub with the read token, telling its bytes to the report."""

    def progress(done: int, total: int) -> None:
        context.reporter.progress(Progress(step=done, total=total, unit="bytes"))

    return Hub(context.token("hub"), context.cache / "hub", progress)


def _choose(context: RunContext, hub: Hub, *, weights: bool) -> dict[str, Wanted]:
    """The repositories of the job and their files by field, the largest last: what may not be read is told first."""
    model, wanted = context.config.spec.model, dict[str, Wanted]()
    if model.repo is not None:
        resolved = hub.resolve(model.repo, model.revision, "model", "model")
        wanted["model"] = _wanted(context, hub, resolved, files=model_files(resolved.names, model, weights=weights))
    if model.adapter is not None and model.adapter.repo is not None:
        resolved = hub.resolve(model.adapter.repo, model.adapter.revision, "model", "model.adapter")
        check_adapter_files(resolved.names, model.adapter)
        wanted["model.adapter"] = _wanted(context, hub, resolved, files=ADAPTER_FILES)
    for index, dataset in enumerate(context.config.spec.datasets):
        if dataset.repo is not None:
            field = f"datasets[{index}]"
            wanted[field] = _choose_of_dataset(context, hub, dataset, dataset.repo, field)
    return dict(reversed(wanted.items()))


def _choose_of_dataset(context: RunContext, hub: Hub, dataset: Dataset, repo: str, field: str) -> Wanted:
    resolved = hub.resolve(repo, dataset.revision, "dataset", field)
    notes: list[str] = []
    if f"{repo.rpartition('/')[2]}.py" in resolved.names and dataset.revision == "main":
        # The rows are where the script would fetch them; the Hub's own conversion holds them as files.
        resolved = hub.resolve(repo, CONVERTED_REVISION, "dataset", field)
        notes = [f"read from the Hub's Parquet files ({CONVERTED_REVISION}), as the repository has a loading script"]
    readme = [name for name in resolved.names if name == "README.md"]
    head = Head.read(hub.download(resolved, readme, field)) if readme else Head()
    splits, config = choose_files(resolved.names, head, dataset.config, field)
    notes += note_unused(resolved.names, splits, head, dataset.config)
    return _wanted(context, hub, resolved, files=readme, splits=splits, config=config, notes=notes)


def _wanted(context: RunContext, hub: Hub, resolved: ResolvedRepo, **found: Any) -> Wanted:
    directory = str(hub.directory(resolved).relative_to(context.cache))
    return resolved, FetchedRepo(directory=directory, repo=resolved.repo, commit=resolved.commit, **found)
