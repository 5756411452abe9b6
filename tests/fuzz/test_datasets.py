"""Files of a dataset: whatever they hold, what comes out are rows, reasons for bad ones, or one sentence."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import yaml
from hypothesis import strategies as st

from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import readers
from finetune_trainer.prepare.readers import UnreadableFileError
from finetune_trainer.prepare.readme import Head
from finetune_trainer.prepare.sources import choose_files

from .hunting import changed, damaged, hunt

ROWS: list[dict[str, Any]] = [
    {"text": 'a "quoted", text', "label": 1, "turns": [{"role": "user", "content": "hi"}], "score": 0.5},
    {"text": "zwei\nZeilen", "label": 0, "turns": [], "score": None},
    {"text": "", "label": 2, "turns": [{"role": "assistant", "content": "é"}], "score": 1e9},
]
CSV = b'text,label\n"a ""quoted"" text",1\nplain,0\n"two\nlines",2\n'
MOST_ROWS = 2000


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    out = io.BytesIO()
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, out, **options)
    return out.getvalue()


def arrow(rows: list[dict[str, Any]], new: Any = pyarrow.ipc.new_stream) -> bytes:
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


LINES = "\n".join(json.dumps(row) for row in ROWS).encode()
TEXTS = (
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"[" * 2000,
    b"{",
    b"1e999",
    b"NaN",
)
FORMATS: dict[str, tuple[list[bytes], tuple[bytes, ...]]] = {
    "csv": ([CSV, CSV.replace(b",", b";")], TEXTS),
    "tsv": ([CSV.replace(b",", b"\t")], TEXTS),
    "jsonl": ([LINES], TEXTS),
    "json": (
        [json.dumps(ROWS).encode(), json.dumps({"data": ROWS}).encode(), LINES, b'{"a": [1, 2], "b": [3, 4]}'],
        TEXTS,
    ),
    "txt": ([b"one\ntwo\n\nthree"], TEXTS),
    "parquet": ([parquet(ROWS), parquet(ROWS, compression="zstd", use_dictionary=False), parquet(ROWS[:0])], ()),
    "arrow": ([arrow(ROWS), arrow(ROWS[:0]), arrow(ROWS, pyarrow.ipc.new_file)], ()),
    "csv.gz": ([gzip.compress(CSV, mtime=0)], ()),
    "jsonl.bz2": ([bz2.compress(LINES)], ()),
    "jsonl.zst": ([pa.compress(LINES, codec="zstd", asbytes=True)], ()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_rows_gives_rows_reasons_or_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{name}"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(UnreadableFileError):
            for row in islice(readers.read_rows(path), MOST_ROWS):
                assert isinstance(row, (dict, str))
        with contextlib.suppress(UnreadableFileError):
            assert all(isinstance(column, str) for column in readers.column_names(path))
        readers.class_names(path)

    hunt(damaged(*FORMATS[name]), read)


HEAD = {
    "language": ["en"],
    "configs": [
        {"config_name": "default", "default": True, "data_files": [{"split": "train", "path": ["data/train-*.csv"]}]},
        {"config_name": "other", "data_dir": "other", "data_files": "*.jsonl"},
    ],
    "dataset_info": [
        {"config_name": "default", "features": [{"name": "label", "dtype": {"class_label": {"names": {"0": "a"}}}}]}
    ],
}
FILES = ["data/train-0.csv", "data/test.csv", "other/a.jsonl", "README.md", "dev.parquet"]
YAML_WORDS = (
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object:os.system ",
    b"? ",
    b"- " * 500,
    b"[" * 500,
    b"---\n",
    b": ",
    b"2020-13-45",
)


def test_the_head_of_a_readme_names_files_or_is_refused_in_one_sentence() -> None:
    def read(readme: str) -> None:
        with contextlib.suppress(TrainerError):
            head = Head.parse(readme)
            for config in (None, "default", "other"):
                head.class_names(config)
                with contextlib.suppress(TrainerError):
                    files, _ = choose_files(FILES, head, config, "datasets[0]")
                    assert {name for names in files.values() for name in names} <= set(FILES)

    def text(head: Any) -> str:
        return f"---\n{yaml.safe_dump(head)}---\n# A dataset\n"

    raw = damaged([text(HEAD).encode()], YAML_WORDS).map(lambda data: data.decode(errors="replace"))
    printable = changed(HEAD).filter(_is_writable).map(text)
    hunt(raw | printable, read)


def _is_writable(value: Any) -> bool:
    try:
        yaml.safe_dump(value).encode()
    except (ValueError, yaml.YAMLError):
        return False
    return True


RECIPES = st.text("*?[]/!-ab.", max_size=40)


def test_patterns_of_a_readme_are_matched_in_time() -> None:
    names = ["a" * 60 + "/" + "b" * 60 + ".csv"] * 3

    def match(pattern: str) -> None:
        head = Head.parse(f"---\n{yaml.safe_dump({'configs': [{'data_files': pattern}]})}---\n")
        with contextlib.suppress(TrainerError):
            choose_files(names, head, None, "datasets[0]")

    hunt(RECIPES, match)
