"""`finetune submit FILE…`: check, then apply."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_api.base import KIND
from finetune_api.documents import read_documents
from finetune_api.validate import check
from finetune_operator.commands._cluster import Context, Namespace, jobs_in, status_of
from finetune_operator.errors import EXIT_BAD_SPEC, EXIT_FAILED, UserError
from finetune_operator.inputs import read_text, source_name

if TYPE_CHECKING:
    from finetune_operator.cluster.as_user.jobs import Jobs


@dataclass(frozen=True)
class Submitted:
    """One job of a file, as it was written."""

    source: str
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name, or what its name will begin with."""
        metadata = self.manifest["metadata"]
        return str(metadata.get("name") or metadata.get("generateName"))


async def submit(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="Files with FineTuneJobs; - reads standard input.")
    ],
    namespace: Namespace = None,
    context: Context = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate on the API server without changing anything.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Then follow the job like `finetune watch`.")] = False,
) -> None:
    """Apply FineTuneJobs to the cluster, after validating them like `finetune validate`.

    Exit codes: 0 applied, 1 the cluster refused, 2 bad spec; with --watch, those of `finetune watch`.
    """
    submitted = [job for name in files for job in _read(name)]
    if not submitted:
        raise UserError(f"{' '.join(files)}: no {KIND} found.")
    if watch and (len(submitted) > 1 or dry_run):
        raise UserError("--watch needs exactly one job and no --dry-run.")
    async with jobs_in(namespace, context) as jobs:
        name = await _apply_all(jobs, submitted, namespace, dry_run=dry_run)
    if watch:
        from finetune_operator.commands.watch import watch as watch_job

        await watch_job(name, _namespace_of(submitted[0], namespace) or jobs.namespace, context)


def _read(name: str) -> list[Submitted]:
    text = read_text(name)
    source = source_name(name)
    checked = check(text)
    for problem in checked.problems:
        print(problem.text(source), file=sys.stderr)
    if checked.problems:
        raise SystemExit(EXIT_BAD_SPEC)
    for note in checked.notes:
        print(f"{source}: {note}", file=sys.stderr)
    manifests = [document.data for document in read_documents(text) if document.data.get("kind") == KIND]
    return [Submitted(source, _without_status(manifest)) for manifest in manifests]


def _without_status(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without the fields that `kubectl get -o yaml` adds."""
    added = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "selfLink")
    metadata = {key: value for key, value in manifest["metadata"].items() if key not in added}
    return {key: value for key, value in manifest.items() if key != "status"} | {"metadata": metadata}


def _namespace_of(job: Submitted, namespace: str | None) -> str | None:
    written = job.manifest["metadata"].get("namespace")
    if written and namespace and written != namespace:
        raise UserError(f"{job.source} says namespace {written}, but -n says {namespace}: remove one of them.")
    return written or namespace


async def _apply_all(jobs: Jobs, submitted: list[Submitted], namespace: str | None, *, dry_run: bool) -> str:
    """Apply each job, whatever became of those before it; returns the name of the last one."""
    from finetune_operator.cluster.as_user.problems import explained

    failures, name = 0, ""
    for job in submitted:
        try:
            with explained(jobs.api.server):
                name = await _apply(jobs, job, namespace, dry_run=dry_run)
        except UserError as error:
            if len(submitted) == 1:
                raise UserError(f"{job.name}: {error.sentence}", error.exit_code) from error
            failures += 1
            print(f"error: {job.name}: {error.sentence}", file=sys.stderr)
    if failures:
        raise UserError(f"{failures} of {len(submitted)} jobs were not applied.", EXIT_FAILED)
    return name


async def _apply(jobs: Jobs, job: Submitted, namespace: str | None, *, dry_run: bool) -> str:
    """Apply one job, print the outcome, and return its name."""
    jobs = replace(jobs, namespace=_namespace_of(job, namespace) or jobs.namespace)
    before = None
    if "name" in job.manifest["metadata"]:
        before = await jobs.find(job.name)
    after = await jobs.apply(job.manifest, dry_run=dry_run)
    name = str(after["metadata"]["name"])
    print(f"{name} {_outcome(before, after)} in namespace {jobs.namespace}{' (dry run)' if dry_run else ''}")
    return name


def _outcome(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    if before is None:
        return "created"
    if before["spec"] != after["spec"]:
        return "changed"
    phase = status_of(after).phase if after.get("status") else None
    return f"unchanged{f' ({phase})' if phase else ''}"
