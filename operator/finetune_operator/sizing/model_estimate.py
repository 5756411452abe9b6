"""The base model's shape without the trainer: from a config.json, a GGUF file, the Hub's cache, or the model's name.

Reads local files only; neither asks the network nor imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.report import ModelFacts
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import first_problem
from finetune_operator.errors import UserError
from finetune_operator.sizing.gguf import gguf_config
from finetune_operator.sizing.model_shapes import UnknownShapeError, known_model, model_facts


@dataclass(frozen=True)
class ModelEstimate:
    """The model's shape and where it was found."""

    facts: ModelFacts
    origin: str


def model_estimate(spec: FineTuneJobSpec, places: Sequence[Path], config: Path | None = None) -> ModelEstimate:
    """The base model's shape: from `config`, from its directory or GGUF file, from the Hub's cache, or by its name.

    Relative paths are looked for in `places`, in order.

    Raises UserError if none of these knows it.
    """
    model = spec.model
    if config is not None:
        return ModelEstimate(_facts(_json(config)), str(config))
    if model.path is not None:
        return _from_path(find_path(model.path, places))
    assert model.repo is not None
    cached = _in_hub_cache(model.repo, model.revision)
    if cached is not None:
        return ModelEstimate(_facts(_json(cached)), f"config.json of {model.repo} in the local Hub cache")
    known = known_model(model.repo)
    if known is None:
        raise UserError(
            f"The shape of {model.repo} is unknown, and a plan does not ask the Hub: download its config.json and pass "
            "it with --model-config FILE."
        )
    return ModelEstimate(known, f"known by its name, {model.repo} (the Hub was not asked)")


def find_path(path: str, places: Sequence[Path]) -> Path:
    """The first of `places` that has this path of the spec, joined; the first of all where none has."""
    paths = [place / path for place in places]
    return next((candidate for candidate in paths if candidate.exists()), paths[0])


def _from_path(path: Path) -> ModelEstimate:
    if path.suffix == ".gguf" and path.is_file():
        return ModelEstimate(_facts(gguf_config(path)), str(path))
    if path.is_dir() and (path / "config.json").is_file():
        return ModelEstimate(_facts(_json(path / "config.json"), _counted(path)), str(path / "config.json"))
    if path.is_dir() and (ggufs := sorted(path.glob("*.gguf"))):
        return ModelEstimate(_facts(gguf_config(ggufs[0])), str(ggufs[0]))
    what = "has no config.json" if path.is_dir() else "does not exist"
    raise UserError(f"model.path: {path} {what}. Pass the model's config.json with --model-config FILE.")


def _facts(config: dict[str, Any], parameters: int | None = None) -> ModelFacts:
    try:
        return model_facts(config, parameters)
    except ValidationError as error:
        why = first_problem(error)
    except UnknownShapeError as error:
        why = str(error)
    except Exception as error:  # a config by strangers has any type in any place
        why = f"its config.json has a value of the wrong kind ({error!r})"
    raise UserError(f"Cannot read the model's shape: {why}.")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON; a model's config.json is needed.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a model's config.json.")
    return data


def _counted(directory: Path) -> int | None:
    """Elements of all tensors, from the headers of the safetensors files."""
    total = 0
    tied = bool(_json(directory / "config.json").get("tie_word_embeddings"))
    for path in directory.glob("model*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(length, path.stat().st_size)))
                total += sum(
                    prod(tensor["shape"])
                    for name, tensor in header.items()
                    if name != "__metadata__" and not (tied and name == "lm_head.weight")
                )
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise UserError(f"{path} has no header of a safetensors file.") from error
    return total or None


def _in_hub_cache(repo: str, revision: str) -> Path | None:
    """A config.json that huggingface_hub downloaded before. The package itself would ask the network for a branch."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{repo.replace('/', '--')}"
    reference = cache / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    config = cache / "snapshots" / commit / "config.json"
    return config if config.is_file() else None
