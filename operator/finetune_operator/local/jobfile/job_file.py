"""A job's file as the user gave it: read, changed by `--set`, validated, in this order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.base import KIND
from finetune_api.documents import DocumentError, read_documents
from finetune_api.spec import FineTuneJob
from finetune_api.validate import check
from finetune_operator.errors import UserError
from finetune_operator.inputs import STDIN, read_text, source_name
from finetune_operator.local.jobfile.overrides import apply_overrides


@dataclass(frozen=True)
class JobFile:
    """One job and the directory that its relative paths start from."""

    job: FineTuneJob
    source: Path


def load(file: str, overrides: list[str]) -> JobFile:
    """The one FineTuneJob in `file` (`-` is stdin). Raises UserError with every problem that it has."""
    text = read_text(file)
    source = Path.cwd() if file == STDIN else Path(file).expanduser().resolve().parent
    file = source_name(file)
    checked = check(_changed(text, file, overrides) if overrides else text)
    if checked.problems:
        # With --set the text is no longer the file's, and its lines mean nothing.
        raise UserError("\n".join(p.text(file) if not overrides else _without_line(p, file) for p in checked.problems))
    if len(checked.jobs) != 1:
        names = ", ".join(job.metadata.name for job in checked.jobs)
        found = f"{len(checked.jobs)} {KIND}s ({names})" if names else f"no {KIND}"
        raise UserError(f"{file} contains {found}: finetune run takes one job per file.")
    return JobFile(checked.jobs[0], source)


def _changed(text: str, file: str, overrides: list[str]) -> str:
    try:
        documents = [document.data for document in read_documents(text)]
    except DocumentError as error:
        raise UserError(f"{file}:{error.line or 1}: {error.sentence}") from error
    jobs = [document for document in documents if isinstance(document, dict) and document.get("kind") == KIND]
    for job in jobs:
        spec: Any = job.get("spec")
        job["spec"] = apply_overrides(spec if isinstance(spec, dict) else {}, overrides)
    return "\n---\n".join(json.dumps(document) for document in documents)


def _without_line(problem: Any, file: str) -> str:
    hint = f" ({problem.hint})" if problem.hint else ""
    return ": ".join(part for part in (file, problem.path, problem.sentence + hint) if part)
