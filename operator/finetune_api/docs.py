"""The reference page, generated from the CRD's schema and the tables beside the models: every field, every rule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from finetune_api.base import API_VERSION, KIND
from finetune_api.crd import Schema, root_schema
from finetune_api.known_datasets import KNOWN_DATASETS
from finetune_api.report import EXIT_CODES
from finetune_api.spec import MUTABILITY, Mutability
from finetune_api.structure import PATTERNS
from finetune_api.traits import USUAL_COLUMNS, Task

JSON_MAXIMUM = 2**53 - 1
"""Largest integer that JSON keeps exactly: a bound of every count, not worth a word."""
CHANGE = {Mutability.ALWAYS: "at any time", Mutability.SUSPENDED: "while `suspend: true`", Mutability.NEVER: "never"}

HEAD = f"""<!-- Generated from operator/finetune_api by `make generate`; edits are lost. -->
# FineTuneJob reference

All fields of a FineTuneJob: `apiVersion: {API_VERSION}`, `kind: {KIND}`, short name `ftj`. On a cluster,
`kubectl explain ftj.spec --recursive` shows the same text. `finetune validate FILE` checks a file against it.

Only [`model`](#specmodel), [`datasets`](#specdatasets) and [`tuning.method`](#spectuning) are required.
Fields without a default can be left out; their description says what happens then.
"""


@cache
def render() -> str:
    """The page as Markdown."""
    root = root_schema()
    spec, status = root["properties"]["spec"], root["properties"]["status"]
    parts = [HEAD, "## Contents\n", *_contents(spec, "spec"), ""]
    parts += _section("spec", spec, "The fields of a job, and when each can change once the job exists.")
    for name, schema in spec["properties"].items():
        parts += _sections(f"spec.{name}", schema, CHANGE[MUTABILITY[name]])
    parts += [_rules(root), _known_datasets(), _task_columns(), _exit_codes()]
    parts += _section("status", status, "What happened so far. Written only by the operator or `finetune run`.")
    for name, schema in status["properties"].items():
        parts += _sections(f"status.{name}", schema, None)
    return "\n".join(parts).rstrip() + "\n"


def _contents(schema: Schema, path: str) -> Iterator[str]:
    yield f"- [`{path}`]({_anchor(path)}): " + ", ".join(
        f"[`{name}`]({_anchor(f'{path}.{name}')})" if _object_in(below) else f"`{name}`"
        for name, below in schema["properties"].items()
    )
    yield "- [rules](#rules)"
    yield "- [datasets known by name](#datasets-known-by-name), [columns per task](#columns-per-task)"
    yield "- [exit codes of the trainer](#exit-codes-of-the-trainer)"
    yield "- [`status`](#status)"


def _anchor(path: str) -> str:
    """GitHub's anchor of a heading: lower case, without dots and brackets."""
    return "#" + "".join(char for char in path.lower() if char.isalnum() or char in "-_")


def _sections(path: str, schema: Schema, change: str | None) -> list[str]:
    """The section of an object field and of everything below it; nothing for a plain value."""
    below = _object_in(schema)
    if below is None:
        return []
    shown = f"{path}[]" if schema["type"] == "array" else path
    intro = [schema["description"]]
    if below is not schema and below.get("description", "") != schema["description"]:
        intro.append(f"Each entry: {below['description'][:1].lower()}{below['description'][1:]}")
    if change is not None:
        intro.append(f"Can change: {change}.")
    parts = _section(shown, below, " ".join(intro))
    for name, field in below["properties"].items():
        parts += _sections(f"{shown}.{name}", field, None)
    return parts


def _section(path: str, schema: Schema, intro: str) -> list[str]:
    required = set(schema.get("required", ()))
    depth = min(2 + path.count("."), 4)
    top = path == "spec"
    head = "| field | type | default | description |" + (" can change |" if top else "")
    lines = [f"{'#' * depth} {path}", "", intro, "", head, "|---" * (head.count("|") - 1) + "|"]
    for name, field in schema["properties"].items():
        label = f"[`{name}`]({_anchor(f'{path}.{name}')})" if _object_in(field) else f"`{name}`"
        default = "**required**" if name in required else _default(field)
        cells = [label, type_words(field), default, field["description"].replace("|", "\\|")]
        lines.append("| " + " | ".join(cells + ([CHANGE[MUTABILITY[name]]] if top else [])) + " |")
    return [*lines, ""]


def _object_in(schema: Schema) -> Schema | None:
    """The object with fields that a value is, or that a list's entries or a map's values are."""
    if "properties" in schema:
        return schema
    inner = schema.get("items") or schema.get("additionalProperties")
    return _object_in(inner) if isinstance(inner, dict) else None


def _default(field: Schema) -> str:
    value = field.get("default")
    if value is None or (isinstance(value, dict) and "properties" in field):
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def type_words(field: Schema) -> str:
    """A field's type for a reader: `integer ≥ 1`, `one of full, lora`, `list of text (at most 64)`."""
    if "enum" in field:
        values = [f"`{value}`" for value in field["enum"]]
        return "one of " + ", ".join(values) if len(values) > 1 else values[0]
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    match field["type"]:
        case "object" if "properties" in field:
            return "object"
        case "object" if isinstance(field.get("additionalProperties"), dict):
            return f"map of text to {type_words(field['additionalProperties'])}"
        case "array":
            return f"list of {type_words(field['items'])}{_size(field)}"
        case "string" if field.get("format") == "date-time":
            return "time"
        case "string" if field.get("pattern") in PATTERNS:
            return f"text: {PATTERNS[field['pattern']]}"
        case "string":
            return "text"
        case "boolean":
            return "true or false"
    return f"{field['type']}{_limits(field)}"


def _size(field: Schema) -> str:
    least, most = field.get("minItems"), field.get("maxItems")
    if least and least == most:
        return f" (exactly {least})"
    words = [f"at least {least}" if least else "", f"at most {most}" if most else ""]
    shown = ", ".join(word for word in words if word)
    return f" ({shown})" if shown else ""


def _limits(field: Schema) -> str:
    words = []
    if "minimum" in field:
        words.append(f"{'>' if field.get('exclusiveMinimum') else '≥'} {field['minimum']:g}")
    if field.get("maximum", JSON_MAXIMUM) < JSON_MAXIMUM:
        words.append(f"{'<' if field.get('exclusiveMaximum') else '≤'} {field['maximum']:g}")
    return " " + ", ".join(words) if words else ""


def _rules(root: Schema) -> str:
    lines = [
        "## Rules",
        "",
        "Combinations of fields that are refused. The API server and `finetune validate` give the same message.",
        "",
        "| field | message |",
        "|---|---|",
    ]
    for path, rule in _all_rules(root, ""):
        if "oldSelf" not in rule["rule"]:
            lines.append(f"| `{path}{rule.get('fieldPath', '')}` | {_escaped(rule['message'])} |")
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "\\<")


def _all_rules(schema: Schema, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for rule in schema.get("x-kubernetes-validations", ()):
        yield path or "metadata.name", rule
    for name, below in schema.get("properties", {}).items():
        yield from _all_rules(below, f"{path}.{name}" if path else name)
    if isinstance(schema.get("items"), dict):
        yield from _all_rules(schema["items"], f"{path}[]")


def _known_datasets() -> str:
    lines = [
        "## Datasets known by name",
        "",
        "For these datasets `repo` is sufficient. Fields that are set in the job take precedence.",
        "",
        "| repo | task | columns | splits |",
        "|---|---|---|---|",
    ]
    for repo, known in sorted(KNOWN_DATASETS.items()):
        columns = ", ".join(f"{key}: {value}" for key, value in known.columns.items())
        splits = ", ".join(f"{key}: {value}" for key, value in known.splits.items())
        lines.append(f"| `{repo}` | {known.task} | {columns} | {splits} |")
    return "\n".join([*lines, ""])


def _task_columns() -> str:
    lines = ["## Columns per task", "", "| task | columns |", "|---|---|"]
    lines += [f"| `{task}` | {', '.join(f'`{name}`' for name in task.traits.columns)} |" for task in Task]
    lines += ["", "A column that is not set is looked for under its usual names ([data.md](data.md)).", ""]
    lines += ["| column | usual names |", "|---|---|"]
    lines += [f"| `{role}` | {', '.join(f'`{name}`' for name in names)} |" for role, names in USUAL_COLUMNS.items()]
    return "\n".join([*lines, ""])


def _exit_codes() -> str:
    lines = [
        "## Exit codes of the trainer",
        "",
        "Exit codes of a pod's container. The same class is in its termination message and in the status.",
        "",
        "| class | code |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {code} |" for name, code in EXIT_CODES.items()]
    return "\n".join([*lines, ""])
