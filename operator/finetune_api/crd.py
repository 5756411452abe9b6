"""The CustomResourceDefinition, generated from the models: types, limits, defaults, descriptions, rules, columns.

A structural schema as the API server requires: no references, no nulls, no `additionalProperties: false`.
Fields without a default that can be left out are simply not required.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from finetune_api.base import GROUP, KIND, PLURAL, VERSION, ApiModel, Rule
from finetune_api.fields import submodel
from finetune_api.spec import FineTuneJob, FineTuneJobSpec
from finetune_api.status import JobStatus

Schema = dict[str, Any]

COPIED = ("type", "format", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "maxProperties")
"""Keywords that mean the same in pydantic's JSON schema and in the CRD's."""
LIST_KEYWORDS = ("x-kubernetes-list-type", "x-kubernetes-list-map-keys")

COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("Phase", "string", ".status.phase", 0),
    ("Stage", "string", ".status.stage", 0),
    ("Progress", "string", ".status.progressText", 0),
    ("ETA", "string", ".status.etaText", 0),
    ("Loss", "number", ".status.progress.loss", 0),
    ("Metric", "string", ".status.metricText", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason', 1),
    ("Method", "string", ".spec.tuning.method", 1),
    ("GPU-Hours", "number", ".status.gpuHours", 1),
    ("Model", "string", ".status.published.url", 1),
)
"""Name, type, path and priority (1: only with `-o wide`) of what `kubectl get ftj` prints."""


@cache
def render() -> str:
    """The CRD as YAML, ready for `kubectl apply --server-side -f -`."""
    head = "# Generated from operator/finetune_api by `make generate`; edits are lost.\n"
    return head + yaml.safe_dump(definition(), sort_keys=False, allow_unicode=True, width=110)


def definition() -> dict[str, Any]:
    """The CRD as an object."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/name": "finetune-operator"},
            # Uninstalling the chart must not delete all jobs.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["ml"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in COLUMNS],
                    "schema": {"openAPIV3Schema": root_schema()},
                }
            ],
        },
    }


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    return column | ({"priority": priority} if priority else {})


@cache
def root_schema() -> Schema:
    """Schema of the whole resource."""
    return {
        "type": "object",
        "description": _sentence(FineTuneJob.__doc__),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"`{GROUP}/{VERSION}`."},
            "kind": {"type": "string", "description": f"`{KIND}`."},
            "metadata": {"type": "object"},
            "spec": model_schema(FineTuneJobSpec),
            "status": model_schema(JobStatus, defaults=False),
        },
        "x-kubernetes-validations": [_validation(rule) for rule in FineTuneJob.cel_rules],
    }


def model_schema(model: type[ApiModel], *, defaults: bool = True) -> Schema:
    """Structural schema of one model. Without `defaults` (status), the API server fills nothing in."""
    wire = model.model_json_schema(by_alias=True, mode="validation")
    return _object(model, wire, wire.get("$defs", {}), defaults)


def _object(model: type[ApiModel], wire: Schema, definitions: dict[str, Schema], defaults: bool) -> Schema:
    schema: Schema = {"type": "object", "description": _sentence(wire.get("description"))}
    if required := wire.get("required"):
        schema["required"] = required
    schema["properties"] = {}
    for name, field in model.model_fields.items():
        alias = field.alias or name
        below = submodel(field.annotation)
        node = _node(wire["properties"][alias], definitions, below, defaults)
        node["description"] = _sentence(field.description) or node.get("description", "")
        if defaults and field.default is not None and not field.is_required():
            node["default"] = _default(field.default)
        schema["properties"][alias] = _in_reading_order(node)
    if model.cel_rules:
        schema["x-kubernetes-validations"] = [_validation(rule) for rule in model.cel_rules]
    return schema


def _node(wire: Schema, definitions: dict[str, Schema], below: type[ApiModel] | None, defaults: bool) -> Schema:
    """One value, with references followed and `null` left out."""
    wire = _follow(_without_null(_follow(wire, definitions)), definitions)
    if wire.get("x-kubernetes-int-or-string"):
        return {key: value for key, value in wire.items() if key not in ("title", "default")}
    if wire.get("type") == "object" and "properties" in wire and below is not None:
        return _object(below, wire, definitions, defaults)
    if "anyOf" in wire:  # a closed list of words or any other: text
        return {"type": "string"}
    node = {key: wire[key] for key in (*COPIED, *LIST_KEYWORDS) if key in wire} | _bounds(wire)
    if "const" in wire:
        node["enum"] = [wire["const"]]
    if node["type"] == "integer":
        node["format"] = "int64"
    elif node["type"] == "array":
        node["items"] = _node(wire["items"], definitions, below, defaults)
    elif node["type"] == "object":
        values = wire.get("additionalProperties")
        if isinstance(values, dict):
            node["additionalProperties"] = _node(values, definitions, below, defaults)
        else:
            node["x-kubernetes-preserve-unknown-fields"] = True
    return node


def _follow(wire: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" not in wire:
        return wire
    return definitions[wire["$ref"].rpartition("/")[2]]


def _without_null(wire: Schema) -> Schema:
    arms = [arm for arm in wire.get("anyOf", []) if arm.get("type") != "null"]
    return arms[0] if len(arms) == 1 else wire


def _bounds(wire: Schema) -> Schema:
    """Limits of a number; OpenAPI 3.0 writes `exclusiveMinimum: true` beside `minimum`."""
    bounds: Schema = {}
    for side in ("minimum", "maximum"):
        exclusive = f"exclusive{side.capitalize()}"
        if side in wire:
            bounds[side] = wire[side]
        elif exclusive in wire:
            bounds[side] = wire[exclusive]
            bounds[exclusive] = True
    return bounds


def _default(value: object) -> object:
    """A complete default: the API server evaluates the rules on it before it fills in nested defaults."""
    return value.to_wire() if isinstance(value, ApiModel) else value


def _validation(rule: Rule) -> dict[str, str]:
    validation = {"rule": rule.rule, "message": rule.message, "reason": rule.reason}
    in_schema = rule.field and not rule.field.startswith(".metadata")  # its fields are not the CRD's to name
    return validation | ({"fieldPath": rule.field} if in_schema else {})


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _in_reading_order(node: Schema) -> Schema:
    first = [key for key in ("type", "description", "default") if key in node]
    return {key: node[key] for key in (*first, *(key for key in node if key not in first))}
