"""`python docs/code_map.py [--check]`: write docs/code-map.md, one line per module, from the modules' docstrings."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "code-map.md"
PACKAGES = ("operator/finetune_api", "operator/finetune_operator", "trainer/finetune_trainer")

HEAD = """<!-- Generated from the modules' docstrings by `make generate`; edits are lost. -->
# Code map

All modules of the operator and the trainer, with the first sentence of their docstrings.
[architecture.md](architecture.md) explains how the packages work together.
"""


def summary(module: Path) -> str:
    """The first sentence of the module's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if docstring is None:
        sys.exit(f"{module.relative_to(ROOT)} has no docstring: begin it with one sentence that says what it is for")
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    sentence, end, _ = paragraph.partition(". ")
    return sentence + end.strip()


def modules() -> Iterator[Path]:
    """All modules, sorted by folder and name."""
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent.parts, path.name))


def render() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for folder, paths in itertools.groupby(modules(), key=lambda path: path.parent):
        where = folder.relative_to(ROOT)
        names = {path.name: summary(path) for path in paths if path.stat().st_size}
        parts += [f"## {where}", "", *([names["__init__.py"], ""] if "__init__.py" in names else [])]
        parts += [f"- [{name}](../{where}/{name}): {text}" for name, text in names.items() if name != "__init__.py"]
        parts.append("")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` only say whether it is up to date."""
    page = render()
    if "--check" not in arguments:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        print("docs/code-map.md does not match the modules: run make generate and commit it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
