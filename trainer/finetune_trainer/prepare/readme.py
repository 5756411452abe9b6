"""The YAML head of a dataset's README.md: which files make up which split, and what integer labels are called.

Anybody may have written it, so that every part which is used is typed, and the rest is left unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError

from finetune_api.report import FailureClass
from finetune_api.structure import first_problem
from finetune_trainer.failures import TrainerError

LONGEST_HEAD_CHARACTERS = 1 << 20


def _as_text(value: Any) -> Any:
    """Names such as `2023` or `yes` are numbers and booleans to YAML."""
    return str(value) if isinstance(value, bool | int | float) else value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


def _as_entries(value: Any) -> Any:
    """`train.csv`, `[a.csv, b.csv]`, `{train: a.csv}` and `[{split: train, path: a.csv}]` mean the same."""
    if isinstance(value, dict):
        return [{"split": split, "path": path} for split, path in value.items()]
    entries = _as_list(value)
    texts = entries and all(isinstance(entry, str) for entry in entries)
    return [{"split": "train", "path": entries}] if texts else entries


Text = Annotated[str, BeforeValidator(_as_text)]


class SplitFiles(BaseModel):
    """File patterns of one split."""

    split: Text
    path: Annotated[list[str], BeforeValidator(_as_list)]


class Config(BaseModel):
    """One configuration of the dataset."""

    config_name: Text = "default"
    data_files: Annotated[list[SplitFiles], BeforeValidator(_as_entries)] = []
    data_dir: Text | None = None
    default: bool = False


class Feature(BaseModel):
    """One column."""

    name: Text
    dtype: Any = None

    def class_names(self) -> list[str]:
        """Names of the integers in this column; empty if it holds anything else."""
        label = self.dtype.get("class_label") if isinstance(self.dtype, dict) else None
        names = label.get("names") if isinstance(label, dict) else None
        given = list(names.values()) if isinstance(names, dict) else names
        scalars = isinstance(given, list) and all(isinstance(name, str | bool | int | float) for name in given)
        return [str(name) for name in given] if scalars and given else []


class Info(BaseModel):
    """What the head says of the columns of one configuration."""

    config_name: Text | None = None
    features: Annotated[list[Feature], BeforeValidator(_as_list)] = []


class _Wire(BaseModel):
    configs: Annotated[list[Config], BeforeValidator(_as_list)] = []
    dataset_info: Annotated[list[Info], BeforeValidator(_as_list)] = []


@dataclass(frozen=True)
class Head:
    """What the YAML head of a dataset's README.md says."""

    configs: tuple[Config, ...] = ()
    infos: tuple[Info, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Head:
        """The head of the README.md in that directory; an absent one says nothing. Raises as `parse`."""
        try:
            with (directory / "README.md").open(encoding="utf-8", errors="replace") as file:
                return cls.parse(file.read(LONGEST_HEAD_CHARACTERS + 1000))
        except (FileNotFoundError, IsADirectoryError):
            return cls()

    @classmethod
    def parse(cls, readme: str) -> Head:
        """The head of a README; an absent one, or one that is not YAML, says nothing.

        Raises TrainerError (bad-data) where a part that is used has another shape than the Hub documents.
        """
        text = head_of(readme)
        if len(text) > LONGEST_HEAD_CHARACTERS:
            raise _unusable(f"it is longer than {LONGEST_HEAD_CHARACTERS:,} characters")
        try:
            head = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            return cls()
        except RecursionError:
            raise _unusable("it is nested too deeply") from None
        try:
            wire = _Wire.model_validate(head if isinstance(head, dict) else {})
        except ValidationError as error:
            raise _unusable(first_problem(error)) from None
        return cls(tuple(config for config in wire.configs if config.data_files), tuple(wire.dataset_info))

    def class_names(self, config: str | None) -> dict[str, list[str]]:
        """Names of integer labels, by column, of that configuration."""
        info = next((info for info in self.infos if config is None or info.config_name in (config, None)), Info())
        return {feature.name: names for feature in info.features if (names := feature.class_names())}


def head_of(readme: str) -> str:
    """What stands between the `---` lines at the beginning; empty without them."""
    lines = readme[: LONGEST_HEAD_CHARACTERS + 100].split("\n")
    if lines[0].rstrip() != "---":
        return ""
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == "---"), None)
    too_long = len(readme) > LONGEST_HEAD_CHARACTERS
    return "\n".join(lines[1:end]) if end is not None else readme if too_long else ""


def _unusable(why: str) -> TrainerError:
    return TrainerError(FailureClass.BAD_DATA, f"The YAML head of the dataset's README.md cannot be used: {why}.")
