"""Evaluation of the models' CEL rules as on the API server: same rules, same messages.

cel-python is imported with the first rule that is evaluated, not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from finetune_api.base import ApiModel, Rule

if TYPE_CHECKING:
    from finetune_api.documents import PathParts


@dataclass(frozen=True)
class Violation:
    """A rule that does not hold."""

    path: PathParts
    """Where, from the root of what was checked."""
    rule: Rule
    """What does not hold; `rule.message` is the sentence."""


def violations(model: ApiModel, old: ApiModel | None = None, path: PathParts = ()) -> Iterator[Violation]:
    """Yield the rules of the model and of everything in it that do not hold.

    With `old`, the state before a change, the transition rules (those that say `oldSelf`) are evaluated
    too; as on the API server, not within lists, whose entries have no identity.
    """
    yield from own_violations(model, old, path)
    for name, field in type(model).model_fields.items():
        value, before = getattr(model, name), getattr(old, name, None)
        here = (*path, field.alias or name)
        if isinstance(value, ApiModel):
            yield from violations(value, before if isinstance(before, ApiModel) else None, here)
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, ApiModel):
                    yield from violations(entry, None, (*here, index))


def own_violations(model: ApiModel, old: ApiModel | None = None, path: PathParts = ()) -> Iterator[Violation]:
    """Yield the model's own rules that do not hold, not those of what is in it."""
    rules = [rule for rule in model.cel_rules if old is not None or "oldSelf" not in rule.rule]
    if not rules:
        return
    scope = {"self": model.to_wire()}
    if old is not None:
        scope["oldSelf"] = old.to_wire()
    context = _as_cel(scope)
    for rule in rules:
        if not _program(rule.rule).evaluate(context):
            yield Violation((*path, *(part for part in rule.field.split(".") if part)), rule)


def _as_cel(scope: dict[str, Any]) -> dict[str, Any]:
    from celpy import json_to_cel

    return {name: json_to_cel(value) for name, value in scope.items()}


@cache
def _program(rule: str) -> Any:
    import celpy

    environment = celpy.Environment()
    return environment.program(environment.compile(rule))
