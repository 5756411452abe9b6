"""The page of private APIs lists exactly those that the code uses, with tests that exist."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
SOURCES = sorted(path for folder in ("operator", "trainer") for path in (ROOT / folder).rglob("*.py"))
OURS = {"finetune_api", "finetune_operator", "finetune_trainer"}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "private-apis.md").read_text().splitlines()
    if line.startswith("| `")
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Dotted names that are imported from other packages, and whether a part of them is private."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] not in OURS | sys.stdlib_module_names:
                yield name, any(map(is_private, parts))


def attributes(tree: ast.Module) -> Iterator[str]:
    """Private attributes of anything but the object itself and the standard library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()") and owner.split(".")[0] not in sys.stdlib_module_names:
                yield node.attr


def test_the_page_lists_the_private_apis_in_use() -> None:
    used = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        used |= {name for name, private in imports(tree) if private} | set(attributes(tree))
    listed = {name for row in ROWS for name in re.findall(r"`([\w.]+)`", row[0])}
    private = {name for name in listed if any(map(is_private, name.split(".")))}
    assert {name if name in used else name.rsplit(".")[-1] for name in private} == used


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_each_row_names_sources_that_use_it_and_tests_that_exist(row: list[str]) -> None:
    apis, _, source, _, tests = row
    text = (ROOT / "trainer" / "finetune_trainer" / source.strip("`")).read_text()
    for name in re.findall(r"`([\w.]+)`", apis):
        assert re.search(rf"\b{name.rsplit('.')[-1]}\b", text), name
    assert all((ROOT / test).is_file() for test in re.findall(r"`([\w./]+)`", tests))


def test_packages_whose_private_apis_are_used_have_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    bounded = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, wanted)
        if any(specifier.operator == "<" for specifier in requirement.specifier)
    }
    assert {canonicalize_name(row[1]) for row in ROWS} <= bounded
