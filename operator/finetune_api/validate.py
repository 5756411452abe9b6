"""Validation of job files: what the API server would refuse and more, with line, field and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_origin

from finetune_api.base import API_VERSION, GROUP, KIND, ApiModel
from finetune_api.cel import own_violations, violations
from finetune_api.documents import Document, DocumentError, PathParts, read_documents
from finetune_api.fields import submodel, unwrap
from finetune_api.spec import FineTuneJob
from finetune_api.structure import Fault, nearest, read_model, show_path, without_nulls


@dataclass(frozen=True)
class Problem:
    """A problem in a document."""

    document: int
    """Number of the document in the text, from 1."""
    path: str
    """Field path such as `spec.datasets[1].task`; empty for the document itself."""
    line: int | None
    """Line in the text, from 1."""
    sentence: str
    """What is wrong."""
    hint: str = ""
    """What to write instead, if that is known."""

    def text(self, source: str = "") -> str:
        """All of it in one line, as compilers write it: `job.yaml:12: spec.model: is required (…)`."""
        place = ":".join(str(part) for part in (source, self.line) if part)
        hint = f" ({self.hint})" if self.hint else ""
        return ": ".join(part for part in (place, self.path, self.sentence + hint) if part)


@dataclass
class Checked:
    """Content of a text."""

    jobs: list[FineTuneJob] = field(default_factory=list)
    """The valid jobs, in order."""
    problems: list[Problem] = field(default_factory=list)
    """Problems of the other documents."""
    notes: list[str] = field(default_factory=list)
    """Documents of other kinds, which were skipped."""


def check(text: str) -> Checked:
    """Read and check every document of a text."""
    checked = Checked()
    seen = 0
    try:
        for document in read_documents(text):
            seen += 1
            _check_document(document, checked)
    except DocumentError as error:
        checked.problems.append(Problem(seen + 1, "", error.line, error.sentence))
    if not seen and not checked.problems:
        checked.problems.append(Problem(1, "", None, "contains no document", f"begin with kind: {KIND}"))
    return checked


def _check_document(document: Document, checked: Checked) -> None:
    data = document.data
    if isinstance(data, dict) and _is_another_kind(data):
        name = f"{data.get('kind')} {_name(data)}".rstrip()
        checked.notes.append(f"document {document.number}: {name} is not a {KIND} and was skipped")
        return
    if isinstance(data, dict) and data.get("status") is not None:
        data = {key: value for key, value in data.items() if key != "status"}
    faults = list(_faults(data))
    checked.problems.extend(
        Problem(document.number, show_path(fault.path), document.line(fault.path), fault.sentence, fault.hint)
        for fault in sorted(faults, key=lambda fault: document.line(fault.path) or 0)
    )
    if not faults:
        checked.jobs.append(FineTuneJob.model_validate(_named(without_nulls(data))))


def _is_another_kind(data: dict[str, Any]) -> bool:
    """Whether the document is clearly not meant to be a FineTuneJob."""
    version, kind = data.get("apiVersion"), data.get("kind")
    if not isinstance(version, str) or not isinstance(kind, str) or kind == KIND:
        return False
    return not version.startswith(f"{GROUP}/") and nearest(kind, [KIND]) is None


def _name(data: dict[str, Any]) -> str:
    metadata = data.get("metadata")
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def _named(data: Any) -> Any:
    """A document with generateName as it will be once the API server has named it."""
    metadata = data.get("metadata") if isinstance(data, dict) else None
    if isinstance(metadata, dict) and "name" not in metadata and isinstance(metadata.get("generateName"), str):
        return {**data, "metadata": {**metadata, "name": f"{metadata['generateName']}xxxxx"}}
    return data


def _faults(data: Any) -> Iterator[Fault]:
    if not isinstance(data, dict):
        yield Fault((), "is not a map of fields", f"begin with apiVersion: {API_VERSION} and kind: {KIND}")
        return
    for name, value in (("apiVersion", API_VERSION), ("kind", KIND)):
        if data.get(name) is None:
            yield Fault((name,), "is required", f"write {name}: {value}")
    data = _named(without_nulls(data))
    job, faults = read_model(FineTuneJob, data)
    yield from faults
    if job is not None:
        yield from (Fault(found.path, found.rule.message) for found in violations(job))
    else:
        yield from _rules_of_whole_parts(FineTuneJob, data, ())


def _rules_of_whole_parts(model: type[ApiModel], data: Any, path: PathParts) -> Iterator[Fault]:
    """Violated rules of the objects in a faulty document that are valid on their own."""
    if not isinstance(data, dict):
        return
    whole, _ = read_model(model, data)
    if whole is not None:
        yield from (Fault(found.path, found.rule.message) for found in own_violations(whole, path=path))
    for name, field_ in model.model_fields.items():
        key = field_.alias or name
        below, value = submodel(field_.annotation), data.get(key)
        if below is None or value is None:
            continue
        if get_origin(unwrap(field_.annotation)[0]) is list:
            for index, entry in enumerate(value if isinstance(value, list) else ()):
                yield from _rules_of_whole_parts(below, entry, (*path, key, index))
        else:
            yield from _rules_of_whole_parts(below, value, (*path, key))
