"""Which files of a dataset make up which split, by their names alone: nothing is opened.

The same rules serve a directory and a repository: configurations and patterns from the YAML head of README.md
where there are any, else the split that a file's name or folder says, else everything is `train`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from finetune_api.report import FailureClass
from finetune_api.structure import near_match
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.readme import Config, Head

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".txt")
"""Endings of files with rows; readers.py has a reader for each."""
NAMED_FILES = 5
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
MOST_PATTERNS = 1000
"""Splits, and names with wildcards, of a configuration: each is compared with each file."""
_WILD = set("*?[")
SPLIT_WORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"^(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\b")
_NOT_DATA = re.compile(
    r"(^|/)(\.|dataset_infos?\.json$|dataset_dict\.json$|state\.json$|config\.json$|README|cache-[0-9a-f]{16})",
    re.IGNORECASE,
)


def format_of(name: str) -> str | None:
    """The format that a file name stands for (`.csv` for `a/b.csv.gz`), or None."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in FORMATS else None


def choose_files(names: Sequence[str], head: Head, config: str | None, field: str) -> tuple[dict[str, list[str]], str]:
    """(files by split, the configuration chosen) of a repository or directory with these file names.

    Raises TrainerError (bad-spec) where the configuration is missing or must be named, (bad-data) where there is
    nothing to read.
    """
    data = sorted(name for name in names if format_of(name) and not _NOT_DATA.search(name))
    if head.configs:
        chosen = _choose_config(head.configs, config, field)
        found = _by_patterns(data, chosen, field)
        if found:
            return found, chosen.config_name
    elif config:
        inside = [name for name in data if config in Path(name).parts[:-1]]
        if not inside:
            folders = sorted({part for name in data for part in Path(name).parts[:-1]})
            known = f" Available: {', '.join(folders)}." if folders else " It has no configurations."
            raise TrainerError(
                FailureClass.BAD_SPEC, f"The dataset has no configuration {config!r}.{known}", f"{field}.config"
            )
        data = inside
    if not data:
        raise TrainerError(
            FailureClass.BAD_DATA,
            "The dataset has no files in a supported format (csv, tsv, jsonl, json, parquet, arrow, txt).",
            field,
        )
    return _by_names(data, names), config or "default"


def note_unused(names: Sequence[str], files: dict[str, list[str]], head: Head, config: str | None) -> tuple[str, ...]:
    """A sentence on the data files that belong to no split, where no configuration says what is used."""
    used = {name for members in files.values() for name in members}
    unused = sorted(name for name in names if format_of(name) and not _NOT_DATA.search(name) and name not in used)
    if not unused or config or head.configs:
        return ()
    more = ", …" if len(unused) > NAMED_FILES else ""
    return (f"files that are not used, as their names say no split: {', '.join(unused[:NAMED_FILES])}{more}",)


def _choose_config(configs: Sequence[Config], wanted: str | None, field: str) -> Config:
    by_name = {config.config_name: config for config in configs}
    if wanted is not None:
        if wanted not in by_name:
            raise TrainerError(
                FailureClass.BAD_SPEC,
                f"The dataset has no configuration {wanted!r}.{near_match(wanted, by_name)} "
                f"Available: {', '.join(sorted(by_name))}.",
                f"{field}.config",
            )
        return by_name[wanted]
    defaults = [config for config in configs if config.default]
    if defaults or "default" in by_name or len(by_name) == 1:
        return defaults[0] if defaults else by_name.get("default", next(iter(by_name.values())))
    raise TrainerError(
        FailureClass.BAD_SPEC,
        f"The dataset has several configurations ({', '.join(sorted(by_name))}): set config to one of them.",
        f"{field}.config",
    )


def _by_patterns(data: Sequence[str], config: Config, field: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    folder = f"{config.data_dir}/" if config.data_dir else ""
    entries = [(entry.split, {folder + path for path in entry.path}) for entry in config.data_files]
    wild = sum(bool(_WILD & set(path)) for _, paths in entries for path in paths)
    if max(wild, len(entries)) > MOST_PATTERNS:
        sentence = f"The dataset's README.md has more than {MOST_PATTERNS:,} splits or patterns in one configuration."
        raise TrainerError(FailureClass.BAD_DATA, sentence, field)
    for split, paths in entries:
        patterns = [path for path in paths if _WILD & set(path)]
        matching = [name for name in data if name in paths or any(fnmatch(name, pattern) for pattern in patterns)]
        if matching:
            found[split] = matching
    return found


def _by_names(data: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    saved = {str(Path(name).parent) for name in names if Path(name).name == "dataset_dict.json"}
    found: dict[str, list[str]] = {}
    for name in data:
        folder = Path(name).parent
        # `DatasetDict.save_to_disk` calls each split's folder by its name.
        split = folder.name if folder.name and str(folder.parent) in saved else split_of(name)
        if split:
            found.setdefault(split, []).append(name)
    return found or {"train": list(data)}


def split_of(name: str) -> str | None:
    """The split that a file's path says it belongs to, or None: `data/dev.csv`, `train/0000.parquet`.

    A shard that names a usual split keeps its whole name (`train_sft`), whatever folder it lies in; one that does
    not (`train/data-00000-of-00001.arrow`) belongs to its folder's.
    """
    path = Path(name)
    shard = _SHARD.match(path.name)
    if shard and _usual_split(shard["split"]):
        return shard["split"]
    parts = (path.name.partition(".")[0], *reversed(path.parts[:-1]))
    usual = next(filter(None, map(_usual_split, parts)), None)
    return usual or (shard["split"] if shard and shard["split"] != "data" else None)


def _usual_split(name: str) -> str | None:
    words = re.split(r"[-_. 0-9]+", name.lower())
    return next((split for split, known in SPLIT_WORDS.items() if any(word in known for word in words)), None)
