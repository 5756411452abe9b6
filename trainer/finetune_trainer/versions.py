"""Versions of what computes: part of the origin of every number."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "finetune-operator",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
    "huggingface-hub",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "rouge-score",
    "sacrebleu",
    "numpy",
)


def versions() -> dict[str, str]:
    """Installed version of each package, and of Python; packages that are not there are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
