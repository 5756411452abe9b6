"""Which files of a dataset make up which split, and the rows of a split with their places.

The same rules serve a directory and a repository: configurations and patterns from the YAML head of README.md
where there are any, else the split that a file's name or folder says, else everything is `train`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from finetune_api.report import FailureClass
from finetune_trainer.data.templates import near_match
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import sha256_of
from finetune_trainer.prepare import readers
from finetune_trainer.prepare.readers import Row, UnreadableFileError, format_of
from finetune_trainer.prepare.readme import Config, Head

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


class SourceRow(NamedTuple):
    """One row of a split: its columns, or why it cannot be read."""

    number: int
    """From 1, counted over all files of the split."""
    file: str
    in_file: int
    """Number in that file, from 1."""
    fields: Row | None
    problem: str = ""
    foreign_bytes: bool = False
    """Whether some bytes were not UTF-8 and were read as Windows-1252."""

    @property
    def place(self) -> str:
        """`train.csv, row 12`."""
        return f"{self.file}, row {self.in_file}"


@dataclass(frozen=True)
class SplitSource:
    """The files of one split."""

    name: str
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[SourceRow]:
        number = 0
        for path in self.files:
            file = path.name
            for in_file, row in enumerate(readers.read_rows(path), start=1):
                number += 1
                yield _source_row(number, file, in_file, row)


@dataclass(frozen=True)
class DatasetSource:
    """A dataset on this machine."""

    splits: dict[str, SplitSource]
    origin: str
    """`owner/name@commit` or `path sha256:…`."""
    notes: tuple[str, ...] = ()


def choose_files(names: Sequence[str], head: Head, config: str | None, field: str) -> tuple[dict[str, list[str]], str]:
    """(files by split, the configuration chosen) of a repository or directory with these file names.

    Raises TrainerError (bad-spec) where the configuration is missing or must be named, (bad-data) where there is
    nothing to read.
    """
    data = sorted(name for name in names if format_of(name) and not _NOT_DATA.search(name))
    if head.configs:
        chosen = _choose_config(head.configs, config, field)
        found = _by_patterns(data, chosen)
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


def _by_patterns(data: Sequence[str], config: Config) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in config.data_files:
        patterns = [f"{config.data_dir}/{pattern}" if config.data_dir else pattern for pattern in entry.path]
        matching = [name for name in data if any(fnmatch(name, pattern) for pattern in patterns)]
        if matching:
            found[entry.split] = matching
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


def open_source(
    root: Path,
    files: dict[str, list[str]],
    names: dict[str, list[str]],
    origin: str,
    notes: tuple[str, ...] = (),
) -> DatasetSource:
    """A dataset of files below `root`. `names`: class names from the README, used where the files have none."""
    splits: dict[str, SplitSource] = {}
    dialects: dict[str, None] = {}
    for split, members in files.items():
        paths = tuple(root / member for member in members)
        try:
            columns = dict.fromkeys(name for path in paths[:1] for name in readers.column_names(path))
            found = [(path.name, readers.dialect_of(path)) for path in paths]
        except UnreadableFileError as error:
            raise TrainerError(FailureClass.BAD_DATA, f"{error}.") from error
        splits[split] = SplitSource(split, paths, tuple(columns), names | readers.class_names(paths[0]))
        dialects |= dict.fromkeys(f"{name}: {dialect}" for name, dialect in found if dialect)
    return DatasetSource(splits, origin, (*notes, *dialects))


def open_path(path: Path, given: str, config: str | None, field: str) -> DatasetSource:
    """The dataset of a file (one split, `train`) or a directory. `given` is the path as the user wrote it."""
    if path.is_file():
        if format_of(path.name) is None:
            known = ", ".join(suffix.removeprefix(".") for suffix in readers.READERS)
            raise TrainerError(
                FailureClass.BAD_SPEC, f"{given} is not in a supported format ({known}).", f"{field}.path"
            )
        files, root, names = {"train": [path.name]}, path.parent, {}
    else:
        members = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
        readme = path / "README.md"
        head = Head.parse(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else Head()
        files, chosen = choose_files(members, head, config, field)
        root, names = path, head.class_names(chosen)
    return open_source(root, files, names, f"{given} sha256:{digest_of_files(root, files)}")


def digest_of_files(root: Path, files: dict[str, list[str]]) -> str:
    """sha256 over the names and contents of the files."""
    total = sha256()
    for split, members in sorted(files.items()):
        for member in members:
            total.update(f"{split}/{member}\0{sha256_of(root / member)}\n".encode())
    return total.hexdigest()


def _source_row(number: int, file: str, in_file: int, row: Row | str) -> SourceRow:
    if isinstance(row, str):
        return SourceRow(number, file, in_file, None, row)
    try:
        texts = [text for text in readers.texts_in(row) if not text.isascii()]
    except RecursionError as error:
        return SourceRow(number, file, in_file, None, str(error))
    half = next(filter(None, map(readers.half_character, texts)), None)
    if half:
        problem = f"a text contains half of a surrogate pair, {half}"
        return SourceRow(number, file, in_file, None, problem)
    foreign = any(map(readers.has_foreign_bytes, texts))
    return SourceRow(number, file, in_file, readers.decoded(row) if foreign else row, "", foreign)
