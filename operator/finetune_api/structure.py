"""pydantic's errors as sentences that a user can act on: what is wrong, and what to write instead.

As strict as the API server: `"3"` is not a number, `learning_rate` is not a field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune_api.base import ApiModel
from finetune_api.documents import PathParts
from finetune_api.fields import all_paths, field_at, field_names, is_optional, model_at, paths_of, unwrap

AnyModel = TypeVar("AnyModel", bound=ApiModel)

NEAR = 70
"""Similarity (0 to 100) above which a misspelt name is matched to a known one."""

HABITS = {
    "lr": "learningRate",
    "batchSize": "globalBatchSize",
    "perDeviceTrainBatchSize": "globalBatchSize",
    "numTrainEpochs": "epochs",
    "numEpochs": "epochs",
    "maxLength": "maxSequenceLength",
    "maxSeqLength": "maxSequenceLength",
    "maxSeqLen": "maxSequenceLength",
    "optim": "optimizer",
    "gradientCheckpointing": "activationCheckpointing",
    "r": "rank",
    "loraAlpha": "alpha",
    "loraDropout": "dropout",
    "useDora": "dora",
    "useRslora": "rslora",
    "gpus": "gpusPerNode",
    "replicas": "nodes",
    "numNodes": "nodes",
    "pushToHub": "publish",
    "hubModelId": "publish.repo",
    "modelNameOrPath": "repo",
    "fsdp": "sharding",
    "earlyStoppingPatience": "earlyStopping.patience",
}
"""Field names of other tools, and their names here."""

CHOICE_HABITS = {
    "sft": "instruction",
    "alpaca": "instruction",
    "instruct": "instruction",
    "instructions": "instruction",
    "promptcompletion": "instruction",
    "inputoutput": "instruction",
    "completion": "instruction",
    "sharegpt": "chat",
    "conversation": "chat",
    "conversational": "chat",
    "messages": "chat",
    "qa": "question-answering",
    "squad": "question-answering",
    "mcq": "multiple-choice",
    "nli": "classification",
    "sentimentanalysis": "classification",
    "textclassification": "classification",
    "languagemodeling": "text",
    "pretraining": "text",
    "cpt": "text",
    "clm": "text",
}
"""Names that other tools give to what a field chooses (here: tasks), without `-` and `_`, and their names here."""

PATTERNS = {
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": "lower-case letters, digits and '-', with a letter or digit at both ends",
    r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$": "lower-case letters, digits, '-' and '.', with a letter or digit at both ends",
    r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$": "owner/name, as the Hub shows it (no https://, no spaces)",
    r"^([0-9]+(h|m|s))+$": "a duration such as 90s, 15m or 1h30m",
    r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$": "a number of bytes such as 200Gi",
    r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$": "an amount such as 8, 500m or 64Gi",
    r"^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$": "layer numbers such as 12-29 or 0,4,8",
    r"^[-._a-zA-Z0-9]+$": "letters, digits, '-', '_' and '.'",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "letters, digits and '_', not beginning with a digit",
}
"""Description of each pattern of the spec."""


@dataclass(frozen=True)
class Fault:
    """A problem of a field."""

    path: PathParts
    sentence: str
    hint: str = ""


def read_model(model: type[AnyModel], data: Any) -> tuple[AnyModel | None, list[Fault]]:
    """The data as that model, or its faults. Nulls count as absent, as on the API server."""
    try:
        text = json.dumps(without_nulls(data))
        return model.model_validate_json(text, strict=True, by_alias=True, by_name=False), []
    except ValidationError as error:
        return None, [_fault(model, detail) for detail in error.errors(include_url=False)]


def without_nulls(data: Any) -> Any:
    """The same without keys whose value is null."""
    if isinstance(data, dict):
        return {key: without_nulls(value) for key, value in data.items() if value is not None}
    return [without_nulls(entry) for entry in data] if isinstance(data, list) else data


def show_path(path: PathParts) -> str:
    """`spec.datasets[1].task`; keys that are no identifiers in quotes: `nodeSelector["a.b/c"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part)}]"
    return text


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of nested data: `training.epochs`, `datasets[0].task`; lists of anything but maps are values."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        for index, entry in enumerate(value):
            yield from leaves(entry, f"{path}[{index}]")
    else:
        yield path, value


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like the word, if it is like it at all."""
    from rapidfuzz import fuzz, process, utils

    found = process.extractOne(
        word, list(choices), scorer=fuzz.ratio, processor=utils.default_process, score_cutoff=NEAR
    )
    return str(found[0]) if found else None


def near_match(given: str, known: Iterable[str]) -> str:
    """` Did you mean '…'?`, or nothing if none of the known names is like it."""
    near = nearest(given, known)
    return f" Did you mean {near!r}?" if near else ""


def first_problem(error: ValidationError, root: str = "") -> str:
    """The first thing that is wrong with a value of a program or a stranger, with its path below `root`."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(part) for part in (*([root] if root else []), *first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def _fault(root: type[ApiModel], detail: ErrorDetails) -> Fault:
    path = tuple(part for part in detail["loc"] if part != "[key]")
    kind, value, limits = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        description = _describe(root, path)
        return Fault(path, "is required", description)
    if kind == "extra_forbidden":
        return _unknown_field(root, path)
    if kind in ("literal_error", "enum"):
        return _not_a_choice(root, path, value, str(limits["expected"]))
    if kind.endswith("_type") or kind in ("int_from_float", "int_parsing"):
        return _wrong_type(root, path, kind, value)
    return Fault(path, _limit(kind, value, limits, detail["msg"]))


def _limit(kind: str, value: Any, limits: dict[str, Any], otherwise: str) -> str:
    """A value of the right type that is out of bounds."""
    shown = _show(value)
    entries = "entries" if isinstance(value, list) else "keys"
    match kind:
        case "string_pattern_mismatch":
            return f"{shown} is not {PATTERNS.get(limits['pattern'], 'of the form ' + limits['pattern'])}"
        case "string_too_long":
            return f"has {len(value):,} characters; at most {limits['max_length']:,} are allowed"
        case "string_too_short":
            return "is empty"
        case "greater_than":
            return f"{shown} must be greater than {limits['gt']:g}"
        case "greater_than_equal":
            return f"{shown} must be {limits['ge']:g} or more"
        case "less_than":
            return f"{shown} must be less than {limits['lt']:g}"
        case "less_than_equal":
            return f"{shown} must be {limits['le']:g} or less"
        case "too_short":
            return f"needs at least {limits['min_length']} {entries}, has {limits['actual_length']}"
        case "too_long":
            return f"has too many {entries}; at most {limits['max_length']} are allowed"
    own = otherwise.removeprefix("Value error, ")
    return own[:1].lower() + own[1:]


def _unknown_field(root: type[ApiModel], path: PathParts) -> Fault:
    name, siblings = str(path[-1]), field_names(model_at(root, path[:-1]))
    sentence = f"unknown field {name}"
    camel = re.sub(r"[_-]+([a-zA-Z0-9])", lambda found: found[1].upper(), name)
    if camel in siblings:
        return Fault(path, sentence, f"did you mean {camel}?")
    wanted = HABITS.get(camel, camel)
    if wanted.split(".")[0] in siblings:
        return Fault(path, sentence, f"did you mean {wanted}?")
    if elsewhere := paths_of(root, wanted):
        return Fault(path, sentence, f"did you mean {' or '.join(elsewhere[:2])}?")
    if near := nearest(camel, siblings):
        return Fault(path, sentence, f"did you mean {near}?")
    near = nearest(camel, sorted({found.rpartition(".")[2] for found in all_paths(root)}))
    if near and len(name) > 3:
        return Fault(path, sentence, f"did you mean {' or '.join(paths_of(root, near)[:2])}?")
    return Fault(path, sentence, f"known fields: {', '.join(siblings)}" if siblings else "")


def _not_a_choice(root: type[ApiModel], path: PathParts, value: Any, expected: str) -> Fault:
    choices = re.findall(r"'([^']*)'", expected)
    shown = ", ".join(choices)
    if isinstance(value, bool) or value is None:
        hint = "put it in quotes" if "on" in choices or "off" in choices else f"write one of {shown}"
        return Fault(path, f"{_show(value)} must be one of {shown}", hint)
    near = CHOICE_HABITS.get(re.sub(r"[-_ ]", "", str(value).lower()), "")
    near = near if near in choices else nearest(str(value), choices) or ""
    sentence = f"{_show(value)} must be {'one of ' if len(choices) > 1 else ''}{shown}"
    return Fault(path, sentence, f"did you mean {near}?" if near else "")


_TYPE_WORDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a map of names to values",
    "model_type": "a map of fields",
    "model_attributes_type": "a map of fields",
}


def _wrong_type(root: type[ApiModel], path: PathParts, kind: str, value: Any) -> Fault:
    sentence = f"{_show(value)} is not {_TYPE_WORDS.get(kind, 'of the right type')}"
    hint = ""
    may_be_absent = is_optional(root, path)
    if kind in ("bool_type", "int_type", "float_type") and value in ("auto", "default", "none", "null", ""):
        hint = "leave the field out to have it chosen" if may_be_absent else "leave the field out for its default"
    elif kind == "bool_type" and isinstance(value, str):
        hint = "remove the quotes" if value.lower() in ("true", "false") else "write true or false"
    elif kind in ("int_type", "float_type", "int_parsing") and isinstance(value, str):
        hint = "remove the quotes" if re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value) else ""
    elif kind == "string_type" and isinstance(value, bool | int | float):
        hint = f'put it in quotes: "{_show(value)}"'
    elif kind == "string_type" and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        hint = f"separate names with commas: {','.join(value)}" if path[-1] == "targetModules" else "write one text"
    elif kind == "list_type":
        hint = "begin each entry with '- '"
    elif kind.startswith("model") and isinstance(value, str):
        hint = _short_form(model_at(root, path), value)
    return Fault(path, sentence, hint)


def _short_form(model: type[ApiModel] | None, value: str) -> str:
    names = field_names(model)
    if "repo" in names and "path" in names:
        return f"write {{{'path' if value.startswith(('/', '.')) else 'repo'}: {value}}}"
    first = "method" if "method" in names else "type" if "type" in names else "name" if "name" in names else ""
    return f"write {{{first}: {value}}}" if first else ""


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a map"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:76]}…{text[-1] if text[-1] == chr(34) else ''}"


def _describe(root: type[ApiModel], path: PathParts) -> str:
    """Description of a required field, or its choices."""
    field = field_at(root, path)
    if field is None:
        return ""
    annotation, _ = unwrap(field.annotation)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return f"one of {', '.join(annotation)}"
    if get_origin(annotation) is Literal:
        return f"write {field.alias}: {get_args(annotation)[0]}"
    return str(field.description or "")
