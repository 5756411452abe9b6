"""YAML means what it means to kubectl, and what cannot be read is said with its line."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.documents import DocumentError, read_documents


def _value(text: str) -> object:
    return next(read_documents(f"a: {text}\n")).data["a"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("42", 42),
        ("-7", -7),
        ("1_000", 1000),
        ("0x1F", 31),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("12-29", "12-29"),
        ("15m", "15m"),
        ("on", True),
        ("yes", True),
        ('"yes"', "yes"),
        ("null", None),
        ("~", None),
        ("1.2.3", "1.2.3"),
        ("v1", "v1"),
        ("e5", "e5"),
    ],
)
def test_a_value_means_what_it_means_to_kubectl(text: str, value: object) -> None:
    found = _value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000, "- " * 3000 + "x"])
def test_deep_nesting_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(DocumentError, match="nested more than 100 levels deep"):
        list(read_documents(text))


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "not YAML"),
        ("a:\n\tb: 1\n", 2, "found a tab"),
        ("a: b: c\n", 1, "a second ': ' in one line"),
        ("a: 1\nb: 2\na: 3\n", 3, "a is set twice, first in line 1"),
        ("a: .nan\n", 1, "not a number that JSON can represent"),
        ("".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'])}]\n" for n in range(20)), 6, "100,000"),
        ("".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, *a{n - 1}' if n else ''}]}}\n" for n in range(40)), 16, "100,000"),
        ("".join(f"a{n}: &a{n} [{f'*a{n - 1}' if n else 'x'}]\n" for n in range(200)), 100, "more than 100 levels"),
        ("a: !!python/object:os.system x\n", 1, "not YAML"),
        ("a: 1\nb: \0\n", 2, "not YAML: contains the control character U+0000"),
        ("? [a]\n: b\n", 1, "a field's name must be text"),
        ("a: &x [*x]\n", 1, "refers to an enclosing value"),
    ],
)
def test_text_that_is_no_document_is_refused_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(DocumentError) as refused:
        list(read_documents(text))
    assert refused.value.line == line
    assert says in refused.value.sentence


def test_empty_documents_are_no_documents_and_others_keep_their_number() -> None:
    documents = list(read_documents("---\n---\na: 1\n---\n# nothing\n---\nb: 2\n"))
    assert [(document.number, document.data) for document in documents] == [(2, {"a": 1}), (4, {"b": 2})]


def test_a_path_knows_its_line_and_a_missing_one_that_of_what_is_around_it() -> None:
    document = next(read_documents("a:\n  - b: 1\n  - b: 2\n    c: 3\n"))
    assert document.line(("a", 1, "c")) == 4
    assert document.line(("a", 1, "missing", "below")) == 3
    assert document.line(("b",)) == 1


def test_anchors_and_merges_are_followed() -> None:
    document = next(read_documents("base: &base {x: 1, y: 2}\nreal:\n  <<: *base\n  y: 3\n"))
    assert document.data["real"] == {"x": 1, "y": 3}


# Python's writer leaves 1e5 bare as a text, for YAML 1.1 needs a dot; kubectl reads it as the number it looks like.
BARE_NUMBER = re.compile(r"[-+]?[0-9._]+[eE][-+]?[0-9]+")
TEXT = st.text().filter(lambda text: not BARE_NUMBER.fullmatch(text))
# It also writes the line breaks of Unicode as they are, which are read back as spaces in a key.
KEY = st.text(st.characters(exclude_characters="\x85\u2028\u2029"), max_size=8).filter(
    lambda text: not BARE_NUMBER.fullmatch(text)
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEY, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEY, JSON, min_size=1, max_size=4))
def test_what_a_yaml_writer_wrote_is_read_back(data: dict[str, object]) -> None:
    text = yaml.safe_dump(data, allow_unicode=True)
    assert json.dumps(next(read_documents(text)).data) == json.dumps(yaml.safe_load(text))
