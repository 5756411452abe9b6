"""Files of every format become rows; what cannot be read is named."""

import csv
import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError, classify
from finetune_trainer.prepare import readers
from finetune_trainer.prepare.dataset_files import FORMATS, choose_files, split_of
from finetune_trainer.prepare.readers import READERS, UnreadableFileError, read_rows
from finetune_trainer.prepare.readme import Config, Head, SplitFiles
from finetune_trainer.prepare.sources import SplitSource, open_path

ROWS = [{"text": "one, two", "label": "a"}, {"text": "three\nfour", "label": "b"}]


def test_a_readme_may_name_many_files_but_few_patterns() -> None:
    def chosen(paths: list[str]) -> dict[str, list[str]]:
        head = Head((Config(data_files=[SplitFiles(split="train", path=paths)]),))
        return choose_files([f"{i}.csv" for i in range(300)], head, None, "datasets[0]")[0]

    assert len(chosen([f"{i}.csv" for i in range(200)])["train"]) == 200
    assert len(chosen([f"{i}*.csv" for i in range(3)])["train"]) == 223
    with pytest.raises(TrainerError, match="more than 1,000 splits or patterns"):
        chosen([f"*{i}.csv" for i in range(2000)])


def test_there_is_a_reader_for_each_format() -> None:
    assert tuple(READERS) == FORMATS


@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.parquet", "rows.csv.gz", "rows.arrow"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name == "rows.arrow":
        table = pa.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    elif name.startswith("rows.js"):
        path.write_text(json.dumps(ROWS) if name == "rows.json" else "\n".join(map(json.dumps, ROWS)))
    else:
        tab = "\t" if "tsv" in name else ","
        content = f'text{tab}label\n"one, two"{tab}a\n"three\nfour"{tab}b\n'.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_rows(path)) == ROWS


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('{"a": {"x": 1}, "b": {"x": 2}}', [{"x": 1}, {"x": 2}]),
        ('{"version": "1", "data": [{"x": 1}]}', [{"x": 1}]),
        ('{"x": [1, 2], "y": [3, 4]}', [{"x": 1, "y": 3}, {"x": 2, "y": 4}]),
        ('{"x": 1}\n{"x": 2}\n', [{"x": 1}, {"x": 2}]),
    ],
    ids=["by key", "below data", "by column", "lines"],
)
def test_json_documents_of_several_shapes_are_rows(tmp_path: Path, content: str, rows: list[object]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert list(read_rows(tmp_path / "a.json")) == rows


def test_a_broken_line_is_a_reason_and_the_next_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": \n[1]\n{"x": 2}\n')
    first, broken, no_object, last = read_rows(tmp_path / "a.jsonl")
    assert (first, last) == ({"x": 1}, {"x": 2})
    assert isinstance(broken, str)
    assert broken.startswith("not JSON")
    assert no_object == "not a JSON object"


def text_and_label(*texts: str) -> list[object]:
    return [{"text": text, "label": "a"} for text in texts]


@pytest.mark.parametrize(
    ("lines", "rows", "dialect"),
    [
        (["one\ta", '"Two" she said\ta', "three\ta", '"Four\ta'], ["one", '"Two" she said', "three", '"Four'], True),
        (['"open\ta', "two\ta", 'closed"\ta'], ['"open', "two", 'closed"'], True),
        (["one\ta", '"open\ta', "three\ta"], ["one", '"open', "three"], True),
        (['"one\ttwo"\ta', '"three\nlines"\ta'], ["one\ttwo", "three\nlines"], False),
        (['"def f():\n\tif x:\n\t\treturn 1"\ta'], ["def f():\n\tif x:\n\t\treturn 1"], False),
    ],
    ids=["within a text", "over rows", "never closed", "as fields", "code"],
)
def test_quotation_marks_of_a_tsv_file_count_only_if_all_of_them_close(
    tmp_path: Path, lines: list[str], rows: list[str], dialect: bool
) -> None:
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *lines]))
    assert list(read_rows(tmp_path / "a.tsv")) == text_and_label(*rows)
    assert readers.dialect_of(tmp_path / "a.tsv").startswith("quotation marks are part of the fields") == dialect


FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(
    rows=st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_csv_writer_wrote_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str, str]], delimiter: str, quoting: Any, encoding: str
) -> None:
    path = tmp_path / ("rows.tsv" if delimiter == "\t" else "rows.csv")
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([("a", "b", "c"), *rows])
    assert list(read_rows(path)) == [dict(zip("abc", row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["one,a", '"two,a', "three,a", "four,a"], r"opens in row 2 \(line 3\) is never closed"),
        (["one,a", '"two,a', "three,a", '"four",a'], r"opens in row 2 \(line 3\) is not closed before line 5"),
    ],
)
def test_a_quotation_mark_that_is_left_open_is_named_with_its_row_and_line(
    tmp_path: Path, lines: list[str], says: str
) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines, ""]))
    with pytest.raises(UnreadableFileError, match=f"a.csv cannot be read: the quotation mark that {says}"):
        list(read_rows(tmp_path / "a.csv"))


def test_a_quoted_field_that_holds_rows_and_a_mark_that_is_not_doubled_are_bad_rows(tmp_path: Path) -> None:
    swallowed = ['"two,a', *["more,a"] * 4, 'last",a']
    (tmp_path / "a.csv").write_text("\n".join(["text,label", "one,a", *swallowed, '"so "it" is",a', "end,a", ""]))
    one, holds_rows, not_doubled, end = read_rows(tmp_path / "a.csv")
    assert [one, end] == text_and_label("one", "end")
    assert holds_rows == "a quoted field holds 4 lines that look like rows: a quotation mark is not closed"
    assert not_doubled == 'a quotation mark within a quoted field is not doubled ("")'


def test_texts_of_many_lines_and_pipes_within_a_line_are_read_as_they_are(tmp_path: Path) -> None:
    texts = ["Dear Ann,\n\nI write, as said.\n\nYours,\nBob", 'a 5" pipe', "", "it's"]
    (tmp_path / "a.csv").write_text(f'text,label\n"{texts[0]}",a\n{texts[1]},a\n,a\n{texts[3]},a\n')
    assert list(read_rows(tmp_path / "a.csv")) == text_and_label(*texts)
    assert readers.dialect_of(tmp_path / "a.csv") == ""


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16-LE"), ("utf-16-be", "UTF-16-BE"), ("utf-32", "UTF-32")],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_files_in_utf_16_are_read_and_said_to_be_so(tmp_path: Path, encoding: str, said: str, name: str) -> None:
    tab = "\t" if name == "a.tsv" else ","
    rows = [{"text": f"one, Zürich {number}", "label": "a"} for number in range(20)]
    fields = "\r\n".join([f"text{tab}label", *(f'"{row["text"]}"{tab}a' for row in rows)])
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    content = fields if "sv" in name else lines if name == "a.jsonl" else json.dumps(rows)
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert list(read_rows(tmp_path / name)) == rows
    assert open_path(tmp_path / name, "d", None, "datasets[0]").notes == (f"{name}: {said}",)


def test_a_file_whose_name_is_not_utf_8_is_named_in_a_sentence_that_can_be_reported(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"train-\xff.csv")).write_text("text,label\none,a\n")
    with pytest.raises(TrainerError, match=r"whose name is not UTF-8, 'train-\\udcff.csv': rename it"):
        open_path(tmp_path, "d", None, "datasets[0]")
    failure = classify(TrainerError(FailureClass.BAD_DATA, "caf\udce9 cannot be read."))
    assert failure.sentence == "caf\\udce9 cannot be read."


def test_files_whose_names_say_no_split_are_named_where_others_say_one(tmp_path: Path) -> None:
    for name in ("train.csv", "more.csv", "test.csv", "notes.md", "README.md"):
        (tmp_path / name).write_text("text,label\none,a\n")
    assert open_path(tmp_path, "d", None, "datasets[0]").notes == (
        "files that are not used, as their names say no split: more.csv",
    )


def test_semicolons_between_fields_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\none, two;a\n")
    assert list(read_rows(tmp_path / "a.csv")) == text_and_label("one, two")
    assert readers.dialect_of(tmp_path / "a.csv") == "fields separated by semicolons"


def test_columns_of_one_name_are_refused_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,label\none,a,b\n")
    table = pa.table([["x"], ["y"]], names=["label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("a.csv", "a.parquet", "a.arrow"):
        with pytest.raises(TrainerError, match=f"{name} cannot be read: several of its columns are called 'label'"):
            open_path(tmp_path / name, "d", None, "datasets[0]")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_may_be_called_json_lines(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS, indent=indent))
    assert list(read_rows(tmp_path / "a.jsonl")) == ROWS


def test_lines_of_lists_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\n[2]\n")
    assert list(read_rows(tmp_path / "a.jsonl")) == ["not a JSON object"] * 2


def test_a_number_that_is_none_holds_no_value(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": NaN, "x": [Infinity, 1]}\n')
    pq.write_table(pa.table({"text": [float("nan"), 1.0]}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.jsonl")) == [{"text": None, "x": [None, 1]}]
    assert list(read_rows(tmp_path / "a.parquet")) == [{"text": None}, {"text": 1.0}]


def test_a_csv_row_with_too_many_fields_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n1,2,3\n")
    assert list(read_rows(tmp_path / "a.csv")) == [{"x": "1", "y": "2"}, "3 fields, but the header has 2"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UnreadableFileError, match=r"a\.parquet cannot be read"):
        list(read_rows(tmp_path / "a.parquet"))


def test_a_parquet_file_with_texts_that_are_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["zwei Zeilen"]}), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"zwei", b"\x80wei"))
    with pytest.raises(UnreadableFileError, match=r"rows\.parquet cannot be read: 'utf-8' codec"):
        list(read_rows(path))


def test_an_arrow_file_whose_offsets_lead_out_of_it_is_named(tmp_path: Path) -> None:
    path, table = tmp_path / "rows.arrow", pa.table({"text": ["a" * 7777, "b" * 7777]})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    sound = struct.pack("<iii", 0, 7777, 15554)
    assert path.read_bytes().count(sound) == 1
    path.write_bytes(path.read_bytes().replace(sound, struct.pack("<iii", 0, 7777, 1 << 30)))
    with pytest.raises(UnreadableFileError, match=r"rows\.arrow cannot be read"):
        list(read_rows(path))


def test_bytes_that_are_not_utf_8_are_read_as_windows_1252_and_marked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text\ncafé\n".encode() + b"caf\xe9 \x93quoted\x94\n")
    rows = list(SplitSource("train", (tmp_path / "a.csv",), ("text",)))
    assert [(row.fields, row.foreign_bytes) for row in rows] == [
        ({"text": "café"}, False),
        ({"text": "café “quoted”"}, True),
    ]


def test_bytes_that_are_not_utf_8_are_read_so_within_the_messages_of_a_chat_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n')
    (row,) = SplitSource("train", (tmp_path / "a.jsonl",), ("messages",))
    assert (row.fields, row.foreign_bytes) == ({"messages": [{"role": "user", "content": "café"}]}, True)


def test_column_names_can_be_shown_whatever_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,gr\xf6\xdfe\none,5\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "\\ud83d": 5}\n')
    assert readers.column_names(tmp_path / "a.csv") == ["text", "größe"]
    assert list(read_rows(tmp_path / "a.csv")) == [{"text": "one", "größe": "5"}]
    assert readers.column_names(tmp_path / "a.jsonl") == ["text", "\ufffd"]


def test_a_row_with_half_of_a_character_cannot_be_used_and_says_which(tmp_path: Path) -> None:
    halves = ['{"text": "\\ud83d\\ude00"}', '{"text": "\\ud83d"}', '{"turns": [{"content": "so \\ude00"}]}']
    (tmp_path / "a.jsonl").write_text("\n".join(halves))
    whole, first, second = SplitSource("train", (tmp_path / "a.jsonl",), ("text",))
    assert whole.fields == {"text": "\U0001f600"}
    assert (first.fields, second.fields) == (None, None)
    assert first.problem == "a text contains half of a surrogate pair, \\ud83d"
    assert "\\ude00" in second.problem


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("data/dev.jsonl", "validation"),
        ("my-test-set.csv", "test"),
        ("validation/0000.parquet", "validation"),
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("train/data-00000-of-00001.arrow", "train"),
        ("test/data-00000-of-00001.arrow", "test"),
        ("data/unlabelled-00000-of-00001.parquet", "unlabelled"),
        ("data-00000-of-00001.arrow", None),
        ("tweets.csv", None),
        ("contest.csv", None),
    ],
)
def test_the_split_is_told_by_the_file_s_name_or_folder(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data-00000-of-00001.arrow", "state.json", "dataset_info.json", "cache-0123456789abcdef.arrow"], ["train"]),
        (["dataset_dict.json", "train/data-00000-of-00001.arrow", "train/state.json"], ["train"]),
        (["dataset_dict.json", "seen/data-00000-of-00001.arrow", "new/data-00000-of-00001.arrow"], ["new", "seen"]),
        (["d/dataset_dict.json", "d/train_sft/data-00000-of-00001.arrow"], ["train_sft"]),
    ],
)
def test_what_save_to_disk_wrote_has_the_splits_of_its_folders(names: list[str], splits: list[str]) -> None:
    files, _ = choose_files(names, Head(), None, "datasets[0]")
    assert sorted(files) == splits
    assert all(name.endswith("-00001.arrow") for members in files.values() for name in members)


def test_a_readme_s_patterns_and_class_names_are_used() -> None:
    readme = """---
configs:
- config_name: plain
  data_files:
  - {split: train, path: "plain/train-*"}
  - {split: test, path: ["plain/test-*"]}
- config_name: other
  data_files: other/*.csv
dataset_info:
- config_name: plain
  features:
  - {name: text, dtype: string}
  - name: label
    dtype:
      class_label:
        names: {'0': activate_my_card, '1': age_limit}
---
# Words
"""
    head = Head.parse(readme)
    names = ["README.md", "plain/train-00000-of-00001.parquet", "plain/test-00000-of-00001.parquet", "other/a.csv"]
    assert choose_files(names, head, "plain", "datasets[0]") == (
        {"train": [names[1]], "test": [names[2]]},
        "plain",
    )
    assert choose_files(names, head, "other", "datasets[0]")[0] == {"train": ["other/a.csv"]}
    assert head.class_names("plain") == {"label": ["activate_my_card", "age_limit"]}
    with pytest.raises(TrainerError, match=r"several configurations \(other, plain\): set config"):
        choose_files(names, head, None, "datasets[0]")
    with pytest.raises(TrainerError, match=r"no configuration 'plian'\. Did you mean 'plain'"):
        choose_files(names, head, "plian", "datasets[0]")


ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'])}]\n" for n in range(30))


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("configs: 5", "configs.0: "),
        ("configs:\n- {config_name: a, data_files: [{path: a.csv}]}", "configs.0.data_files.0.split: Field required"),
        (
            "configs:\n- {config_name: a, data_files: [{split: train, path: {}}]}",
            "path.0: Input should be a valid string",
        ),
        ("configs:\n- {data_files: a.csv, default: [1]}", "default: "),
        ("dataset_info: {features: 5}", "features.0: "),
        (ALIASES + "configs:\n- {config_name: *a29, data_files: a.csv}", "config_name: Input should be a valid string"),
        ("configs: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "x" * (1 << 20), "longer than 1,048,576 characters"),
    ],
)
def test_a_readme_head_of_another_shape_is_refused_in_a_sentence(head: str, says: str) -> None:
    with pytest.raises(TrainerError, match=f"head of the dataset's README.md cannot be used: .*{says}") as refused:
        Head.parse(f"---\n{head}\n---\n")
    assert refused.value.failure_class is FailureClass.BAD_DATA


@pytest.mark.parametrize(
    "head",
    [
        "dataset_info: {features: [{name: label, dtype: {class_label: {names: 5}}}]}",
        "dataset_info: {features: [{name: label, dtype: {class_label: 5}}]}",
        ALIASES + "dataset_info: {features: [{name: label, dtype: {class_label: {names: *a29}}}]}",
        "a: b: c",
        "- 1",
        "2001-99-99",
        "!!python/object:os.system x",
    ],
)
def test_a_readme_head_that_says_nothing_of_use_names_no_class(head: str) -> None:
    assert not Head.parse(f"---\n{head}\n---\n").class_names(None)
    assert not Head.parse(f"---\n{head}").configs


def test_a_readme_head_of_ten_thousand_lines_is_read_in_linear_time() -> None:
    assert Head.parse("---" + "\n" * 200_000 + "x") == Head()


def test_a_directory_is_read_by_its_splits_and_its_digest_follows_its_content(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\n")
    (tmp_path / "test.csv").write_text("text,label\nb,y\n")
    source = open_path(tmp_path, "data", None, "datasets[0]")
    assert {name: [row.fields for row in split] for name, split in source.splits.items()} == {
        "train": [{"text": "a", "label": "x"}],
        "test": [{"text": "b", "label": "y"}],
    }
    (tmp_path / "test.csv").write_text("text,label\nb,z\n")
    assert open_path(tmp_path, "data", None, "datasets[0]").origin != source.origin


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("info", "names"),
    [
        ({"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}, {"label": ["no", "yes"]}),
        ({"info": {"features": {"label": {"names": [], "_type": "ClassLabel"}, "text": 5}}}, {}),
        ({"info": [1]}, {}),
        ([], {}),
        ({"info": {"features": {"label": {"names": 5, "_type": "ClassLabel"}}}}, {}),
    ],
)
def test_parquet_and_arrow_carry_their_own_class_names(
    tmp_path: Path, ending: str, info: object, names: dict[str, list[str]]
) -> None:
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], metadata={"huggingface": json.dumps(info)})
    table = pa.table({"text": ["a"], "label": [1]}, schema=schema)
    if ending == "parquet":
        pq.write_table(table, tmp_path / "train.parquet")
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / "train.arrow"), schema) as stream:
            stream.write_table(table)
    assert open_path(tmp_path, "d", None, "datasets[0]").splits["train"].class_names == names


def test_a_small_file_that_becomes_a_huge_row_is_refused_by_its_name_and_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"a" * 300_000_000 + b'"}\n', 1))
    rows = read_rows(path)
    assert next(rows) == {"text": "a"}
    with pytest.raises(UnreadableFileError, match=r"x.jsonl.gz cannot be read: row 2 is longer than 16,777,216 char"):
        next(rows)


@pytest.mark.parametrize("name", ["x.csv.gz", "x.txt.gz", "x.jsonl.gz", "x.json.gz"])
def test_a_file_that_becomes_many_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(readers, "ANY_EXPANSION_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "the same again"}\n' * 100_000))
    with pytest.raises(UnreadableFileError, match=f"{name} cannot be read: it would become more than 200 times"):
        list(read_rows(tmp_path / name))


def test_a_quoted_field_over_many_lines_is_no_way_around_the_length_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n" + '"x\ny",' * 300 + "\n")
    with pytest.raises(UnreadableFileError, match="row 2 is longer than 1,000 characters"):
        list(read_rows(tmp_path / "a.csv"))


@pytest.mark.parametrize("depth", [200, 100_000])
def test_rows_that_are_nested_too_deeply_are_bad_rows(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "a"}\n{"x": ' + "[" * depth + "]" * depth + '}\n{"x": "b"}\n')
    first, nested, last = SplitSource("train", (path,), ("x",))
    assert (first.fields, last.fields) == ({"x": "a"}, {"x": "b"})
    assert nested.fields is None
    assert nested.problem


def test_a_document_that_is_nested_too_deeply_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UnreadableFileError, match=r"a\.json is not JSON"):
        list(read_rows(tmp_path / "a.json"))
