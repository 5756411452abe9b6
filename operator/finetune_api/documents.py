"""YAML text as documents with line numbers, read as the API server's clients read it.

PyYAML takes `2e-4` for text and `2024-01-01` for a date; kubectl takes the first for a number and the second
for text. All job files are read here, so that the same file means the same everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

PathParts = tuple[str | int, ...]

MAX_VALUES = 100_000
"""Values in one document, each alias counted as what it stands for: some 500 bytes of aliases can mean billions."""
MAX_DEPTH = 100
"""Levels of nesting."""


class _Loader(yaml.SafeLoader):
    """YAML's JSON: text, numbers, yes/no, null, lists, maps; no dates, no numbers in base 60."""


_LEFT_OUT = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _LEFT_OUT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


class DocumentError(ValueError):
    """Text that is not a document: `sentence` says what is wrong, `line` (from 1) where."""

    def __init__(self, sentence: str, line: int | None = None) -> None:
        super().__init__(sentence if line is None else f"line {line}: {sentence}")
        self.sentence = sentence
        self.line = line


@dataclass(frozen=True)
class Document:
    """One document of a file."""

    number: int
    """From 1."""
    data: Any
    """As JSON would hold it."""
    lines: dict[PathParts, int] = field(default_factory=dict)
    """Line (from 1) of each field and list entry."""

    def line(self, path: PathParts) -> int | None:
        """Line of that path, or of the nearest enclosing field that exists."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read_documents(text: str) -> Iterator[Document]:
    """Yield the documents that are not empty; raises `DocumentError` at the first that cannot be read."""
    try:
        loader = _Loader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DocumentError(f"not YAML: contains the control character U+{error.character:04X}", line) from None
    number = 0
    try:
        while loader.check_node():
            node = loader.get_node()
            number += 1
            assert node is not None  # check_node said so
            _measure(node, {})
            lines: dict[PathParts, int] = {(): node.start_mark.line + 1}
            data = _plain(loader, node, (), lines)
            if data is not None:
                yield Document(number, data, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise DocumentError(f"not YAML: {_words(error)}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML: {error}") from None
    except RecursionError:
        raise DocumentError(f"nested more than {MAX_DEPTH} levels deep") from None
    finally:
        loader.dispose()


def _words(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "cannot be read")
    if "\\t" in problem or "'\t'" in problem:
        return "found a tab; indent YAML with spaces only"
    if problem == "mapping values are not allowed here":
        return "a second ': ' in one line, or wrong indentation; put text that contains ': ' in quotes"
    if problem == "could not determine a constructor for the tag":
        return problem
    return f"{problem} ({error.context})" if error.context and error.problem else problem


def _measure(node: Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, levels) of a node with its aliases expanded, without expanding them; refuses what is beyond the limits.

    `known`: the measures of nodes seen before, by id; (0, 0) while a node is being measured.
    """
    if id(node) in known:
        if known[id(node)] == (0, 0):
            raise DocumentError("an alias (*) that refers to an enclosing value", node.start_mark.line + 1)
        return known[id(node)]
    known[id(node)] = (0, 0)
    inner: list[Node] = []
    if isinstance(node, SequenceNode):
        inner = node.value
    elif isinstance(node, MappingNode):
        inner = [part for pair in node.value for part in pair]
    sizes = [_measure(part, known) for part in inner]
    values, levels = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    if values > MAX_VALUES:
        sentence = f"more than {MAX_VALUES:,} values with all aliases (*) expanded"
        raise DocumentError(sentence, node.start_mark.line + 1)
    if levels > MAX_DEPTH:
        raise DocumentError(f"nested more than {MAX_DEPTH} levels deep", node.start_mark.line + 1)
    known[id(node)] = values, levels
    return values, levels


def _plain(loader: _Loader, node: Node, path: PathParts, lines: dict[PathParts, int]) -> Any:
    """The value of a node; notes the line of everything below it."""
    if isinstance(node, ScalarNode):
        return _scalar(loader, node)
    if isinstance(node, SequenceNode):
        entries = []
        for index, entry in enumerate(node.value):
            lines[*path, index] = entry.start_mark.line + 1
            entries.append(_plain(loader, entry, (*path, index), lines))
        return entries
    if not isinstance(node, MappingNode):
        raise DocumentError("must be text, a list or a map", node.start_mark.line + 1)
    _refuse_repeated_keys(node)
    loader.flatten_mapping(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _key(loader, key_node)
        lines[*path, key] = key_node.start_mark.line + 1
        result[key] = _plain(loader, value_node, (*path, key), lines)
    return result


def _scalar(loader: _Loader, node: ScalarNode) -> Any:
    value = loader.construct_object(node)
    if isinstance(value, float) and not math.isfinite(value):
        raise DocumentError(f"{node.value} is not a number that JSON can represent", node.start_mark.line + 1)
    return value if value is None or isinstance(value, str | bool | int | float) else str(node.value)


def _key(loader: _Loader, node: Node) -> str:
    if not isinstance(node, ScalarNode):
        raise DocumentError("a field's name must be text", node.start_mark.line + 1)
    value = loader.construct_object(node)
    if isinstance(value, bool):
        return str(value).lower()
    return str(node.value)


def _refuse_repeated_keys(node: MappingNode) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, ScalarNode) and key.value != "<<":
            if key.value in first:
                raise DocumentError(f"{key.value} is set twice, first in line {first[key.value]}: remove one", line)
            first[key.value] = line
