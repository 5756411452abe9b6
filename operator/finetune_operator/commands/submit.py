"""`finetune submit FILE…`: check, then apply."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_api.base import KIND
from finetune_api.documents import read_documents
from finetune_api.validate import check
from finetune_operator.commands._cluster import Context, Namespace, jobs_in, status_of
from finetune_operator.errors import EXIT_BAD_SPEC, EXIT_FAILED, UserError
from finetune_operator.inputs import read_text, source_name

if TYPE_CHECKING:
    from finetune_operator.cluster.as_user.connection import Connection


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


def submit(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Files with FineTuneJobs; - for standard input.")],
    namespace: Namespace = None,
    context: Context = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Let the API server check, and change nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job, as `finetune watch` does.")] = False,
) -> None:
    """Apply FineTuneJobs to the cluster, after the checks of `finetune validate`.

    Exit codes: 0 applied, 1 the cluster refused, 2 bad spec; with --watch those of `finetune watch`.
    """
    submitted = [job for name in files for job in _read(name)]
    if not submitted:
        raise UserError(f"{' '.join(files)}: there is no {KIND} in it.")
    if watch and (len(submitted) > 1 or dry_run):
        raise UserError("--watch follows one job that is really there: give one job, without --dry-run.")
    connection = jobs_in(namespace, context).connection
    failures = 0
    made = ""
    for job in submitted:
        try:
            made = _apply(connection, job, namespace, dry_run=dry_run)
        except UserError as error:
            if len(submitted) == 1:
                raise UserError(f"{job.name}: {error.sentence}", error.exit_code) from error
            failures += 1
            print(f"error: {job.name}: {error.sentence}", file=sys.stderr)
    if failures:
        raise UserError(f"{failures} of {len(submitted)} jobs were not applied.", EXIT_FAILED)
    if watch:
        from finetune_operator.commands.watch import watch as watch_job

        watch_job(made, _place(submitted[0], namespace) or connection.namespace, context)


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
    """What `kubectl get -o yaml` adds is no part of what is asked for."""
    added = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "selfLink")
    metadata = {key: value for key, value in manifest["metadata"].items() if key not in added}
    return {key: value for key, value in manifest.items() if key != "status"} | {"metadata": metadata}


def _place(job: Submitted, namespace: str | None) -> str | None:
    written = job.manifest["metadata"].get("namespace")
    if written and namespace and written != namespace:
        raise UserError(f"{job.source} says namespace {written}, and -n says {namespace}: leave one of them out.")
    return written or namespace


def _apply(connection: Connection, job: Submitted, namespace: str | None, *, dry_run: bool) -> str:
    """Apply one job, say what became of it, and return its name."""
    from finetune_operator.cluster.as_user.jobs import Jobs, NoSuchJobError

    jobs = Jobs(connection, _place(job, namespace) or connection.namespace)
    before = None
    if "name" in job.manifest["metadata"]:
        try:
            before = jobs.get(job.name)
        except NoSuchJobError:
            before = None
    after = jobs.apply(job.manifest, dry_run=dry_run)
    name = str(after["metadata"]["name"])
    print(f"{name} {_outcome(before, after)} in namespace {jobs.namespace}{' (dry run)' if dry_run else ''}")
    return name


def _outcome(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    if before is None:
        return "is created"
    if before["spec"] != after["spec"]:
        return "is changed"
    phase = status_of(after).phase if after.get("status") else None
    return f"is there already, unchanged{f' ({phase})' if phase else ''}"
