"""`python charts/generate.py [--check]`: generate values.yaml and the README's table from values.schema.json.

The schema describes each value once, so the documentation and Helm's validation cannot differ.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "finetune-operator"
BEGIN, END = "<!-- values: made by charts/generate.py -->\n", "<!-- end of values -->\n"
LEFT_OUT = "global"
"""Helm itself puts it there."""

Schema = dict[str, Any]


def values_yaml(schema: Schema) -> str:
    """The defaults as YAML, each under its description."""
    head = "# Generated from values.schema.json by `make generate`; edits are lost.\n"
    return head + "".join(f"\n{block}" for block in _blocks(schema, ""))


def _blocks(schema: Schema, indent: str) -> Iterator[str]:
    for name, below in _properties(schema):
        comment = textwrap.fill(
            below["description"], 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if "default" in below:
            yield f"{comment}\n{textwrap.indent(_dump({name: below['default']}), indent)}"
        else:
            yield f"{comment}\n{indent}{name}:\n{''.join(_blocks(below, f'{indent}  '))}"


def _dump(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def values_table(schema: Schema) -> str:
    """A Markdown table with one row per value."""
    rows = [f"| `{path}` | `{json.dumps(default)}` | {text} |" for path, default, text in _leaves(schema, "")]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _leaves(schema: Schema, prefix: str) -> Iterator[tuple[str, object, str]]:
    for name, below in _properties(schema):
        if "default" in below:
            yield f"{prefix}{name}", below["default"], below["description"].replace("|", "\\|")
        else:
            yield from _leaves(below, f"{prefix}{name}.")


def _properties(schema: Schema) -> Iterator[tuple[str, Schema]]:
    return ((name, below) for name, below in schema["properties"].items() if name != LEFT_OUT)


def generated() -> dict[Path, str]:
    """What each file must hold."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    readme = CHART / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        CHART / "values.yaml": values_yaml(schema),
        readme: f"{before}{BEGIN}{values_table(schema)}{END}{after}",
    }


def main(arguments: list[str]) -> int:
    """Write the files, or with `--check` only list the stale ones."""
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} does not match values.schema.json: run make generate and commit it", file=sys.stderr)
        return 1 if stale else 0
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
