"""`--set path=value`: changes to a job's file from the command line, their paths checked against the models.

Paths are written as in the file (`training.epochs`); a list takes an index or the `name` of an entry
(`datasets.banking77.weight`). Values are checked afterwards, with the whole document.
"""

from __future__ import annotations

import copy
from typing import Any, get_args, get_origin

from finetune_api.base import ApiModel
from finetune_api.documents import DocumentError, read_documents
from finetune_api.fields import field_at, field_names, paths_of, unwrap
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import nearest
from finetune_operator.errors import UserError


def apply_overrides(spec: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `spec`, as read from the file, with every `path=value` of `overrides` put into it.

    Raises UserError for a path that the model does not have, with the nearest that it has.
    """
    changed = copy.deepcopy(spec)
    for override in overrides:
        path, sign, text = override.partition("=")
        path = path.strip().removeprefix("spec.")
        if not sign or not path:
            raise UserError(f"--set {override}: write it as path=value, such as --set training.epochs=3.")
        _set(changed, path.replace("[", ".").replace("]", "").split("."), text)
    return changed


def _set(spec: dict[str, Any], keys: list[str], text: str) -> None:
    holder: Any = spec
    annotation: Any = FineTuneJobSpec
    for depth, key in enumerate(keys):
        above, last = ".".join(keys[:depth]), depth == len(keys) - 1
        kind, _ = unwrap(annotation)
        if get_origin(kind) is dict:
            # Keys of a free map may hold dots themselves: kubernetes.io/arch.
            _put(holder, ".".join(keys[depth:]), _value(text, get_args(kind)[1], keys))
            return
        position: int | str
        if get_origin(kind) is list:
            position, annotation = _entry(holder, key, above), get_args(kind)[0]
        elif isinstance(kind, type) and issubclass(kind, ApiModel):
            position, annotation = key, _field(kind, key, above)
        else:
            raise UserError(f"--set {'.'.join(keys)}: {above} is a single value and has no {key}.")
        if last:
            _put(holder, position, _value(text, annotation, keys))
            return
        holder = _descend(holder, position, annotation)


def _descend(holder: Any, position: int | str, annotation: Any) -> Any:
    if isinstance(position, str) and not isinstance(holder.get(position), dict | list):
        holder[position] = [] if get_origin(unwrap(annotation)[0]) is list else {}
    return holder[position]


def _put(holder: Any, key: int | str, value: Any) -> None:
    if value is None and isinstance(holder, dict):
        holder.pop(key, None)
    else:
        holder[key] = value


def _field(model: type[ApiModel], key: str, above: str) -> Any:
    info = field_at(model, (key,))
    if info is not None:
        return info.annotation
    prefix = f"{above}." if above else ""
    near, elsewhere = nearest(key, field_names(model)), paths_of(FineTuneJobSpec, key)
    if near:
        hint = f"did you mean {prefix}{near}?"
    elif elsewhere:
        hint = f"did you mean {' or '.join(elsewhere[:3])}?"
    else:
        hint = f"there are {', '.join(field_names(model))}."
    raise UserError(f"--set {prefix}{key}: there is no such field; {hint}")


def _entry(holder: Any, key: str, above: str) -> int:
    entries = holder if isinstance(holder, list) else []
    names = [str(entry.get("name", "")) if isinstance(entry, dict) else "" for entry in entries]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    near = nearest(key, names)
    hint = f"did you mean {above}.{near}?" if near else f"it has {', '.join(filter(None, names)) or len(entries)}."
    raise UserError(f"--set {above}.{key}: {above} has no such entry; {hint}")


def _value(text: str, annotation: Any, keys: list[str]) -> Any:
    """`text` read as YAML; unchanged where the field is a string, so that `revision=1234` stays one."""
    if text.strip() in ("", "null", "~"):
        return None
    kind, _ = unwrap(annotation)
    if isinstance(kind, type) and issubclass(kind, str):
        return text
    try:
        return next(iter(read_documents(text))).data
    except (DocumentError, StopIteration) as error:
        raise UserError(f"--set {'.'.join(keys)}: {text!r} is not valid YAML.") from error
