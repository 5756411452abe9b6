"""Files that are run and not imported: what tests and benchmarks take from them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_script(path: str, name: str) -> ModuleType:
    """A script of the repository (`images/build.py`) as a module of that name, executed anew at every call."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their own module
    spec.loader.exec_module(module)
    return module
