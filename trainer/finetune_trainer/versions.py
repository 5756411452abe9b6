"""Versions of the packages that compute: part of the origin of every number, and the only list of them."""

from __future__ import annotations

import contextlib
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
    """The version of Python and of each installed package."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
