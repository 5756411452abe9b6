"""The models as a tree of fields: which model is where, and the wire names of its fields."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from finetune_api.base import ApiModel
from finetune_api.documents import PathParts


def unwrap(annotation: Any) -> tuple[Any, bool]:
    """The type without `Annotated` and `| None`, and whether None was allowed."""
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            rest = [arm for arm in get_args(annotation) if arm is not type(None)]
            optional = optional or len(rest) < len(get_args(annotation))
            if len(rest) != 1:
                return annotation, optional
            annotation = rest[0]
        else:
            return annotation, optional


def submodel(annotation: Any) -> type[ApiModel] | None:
    """The model that a field holds, itself or as a list's entries or a map's values."""
    annotation, _ = unwrap(annotation)
    arms = get_args(annotation)
    if get_origin(annotation) in (list, dict) and arms:
        return submodel(arms[-1])
    return annotation if isinstance(annotation, type) and issubclass(annotation, ApiModel) else None


def field_names(model: type[ApiModel] | None) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def field_at(root: type[ApiModel], path: PathParts) -> FieldInfo | None:
    parent = model_at(root, path[:-1])
    fields = parent.model_fields.items() if parent else ()
    return next((field for name, field in fields if (field.alias or name) == path[-1]), None)


def model_at(root: type[ApiModel], path: PathParts) -> type[ApiModel] | None:
    model: type[ApiModel] | None = root
    for part in path:
        if model is None:
            return None
        if isinstance(part, int):
            continue
        fields = model.model_fields.items()
        model = next((submodel(field.annotation) for name, field in fields if (field.alias or name) == part), None)
    return model


def is_optional(root: type[ApiModel], path: PathParts) -> bool:
    field = field_at(root, path)
    return bool(field and unwrap(field.annotation)[1])


@cache
def all_paths(root: type[ApiModel]) -> tuple[str, ...]:
    """Every field below the root as `spec.training.epochs`, lists as `spec.datasets[].name`."""

    def walk(model: type[ApiModel], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            path = f"{prefix}{field.alias or name}"
            yield path
            if below := submodel(field.annotation):
                is_list = get_origin(unwrap(field.annotation)[0]) is list
                yield from walk(below, f"{path}[]." if is_list else f"{path}.")

    return tuple(walk(root, ""))


def paths_of(root: type[ApiModel], name: str) -> list[str]:
    return sorted((path for path in all_paths(root) if path.endswith(f".{name}")), key=len)
