"""`python -m finetune_api.generate [--check]`: write the files generated from the models, or show their drift."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune_api import crd, docs

GENERATED: Mapping[str, Callable[[], str]] = {
    "charts/finetune-operator/files/crd.yaml": crd.render,
    "docs/reference.md": docs.render,
}
"""File, relative to the repository's root, and its content."""


def drift(root: Path) -> dict[str, str]:
    """Unified diffs, by name, of the files under `root` that do not match the models."""
    diffs = {}
    for name, render in GENERATED.items():
        path = root / name
        there, wanted = path.read_text(encoding="utf-8") if path.exists() else "", render()
        if there != wanted:
            lines = difflib.unified_diff(
                there.splitlines(keepends=True), wanted.splitlines(keepends=True), name, f"{name} (as it should be)"
            )
            diffs[name] = "".join(lines)
    return diffs


def write(root: Path) -> list[str]:
    """Update the files under `root`; returns the names of those that changed."""
    changed = list(drift(root))
    for name in changed:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GENERATED[name](), encoding="utf-8")
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Write the files; with `--check`, only compare and return 1 if a file differs."""
    parser = argparse.ArgumentParser(prog="python -m finetune_api.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail with a diff if a file is stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="root of the repository")
    options = parser.parse_args(arguments)
    if not options.check:
        changed = write(options.root)
        print("\n".join(f"wrote {name}" for name in changed) or "everything is up to date")
        return 0
    diffs = drift(options.root)
    for name, diff in diffs.items():
        sys.stderr.write(f"{diff}\n{name} does not match the models: run make generate and commit it\n")
    return 1 if diffs else 0


if __name__ == "__main__":
    sys.exit(main())
