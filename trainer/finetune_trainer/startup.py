"""A process's start: imports without what this job does not need, few walks of the garbage collector, a small cache.

What each of these costs is in docs/performance.md.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJobSpec

GC_THRESHOLD = 50_000
"""New objects after which the collector looks at the young ones, while modules are imported; else 700."""

ONEDNN_CACHE_ENTRIES = 64
"""Matrix products, by the sizes of their operands, whose compiled code a CPU keeps: more than one row's step has."""


def unused_packages(spec: FineTuneJobSpec, stage: Stage, gpus: int | None) -> list[str]:
    """Installed packages that others import where they find them, and that this process has no use for.

    `gpus` a node, None if it is not known. A model that brings its own code may want any of them.
    """
    if spec.model.trust_remote_code:
        return []
    found = {
        "bitsandbytes": not spec.tuning.method.traits.four_bit,  # PEFT imports it, for 4-bit layers
        "triton": gpus == 0,  # torch imports it, to compile for GPUs
        "scipy": stage is Stage.TRAIN,  # transformers imports it, for losses of object detection
        # Tokenizers and configs need none, and transformers imports it: 700 MB in each process.
        "torch": stage is Stage.PREPARE and not spec.tuning.method.traits.four_bit,
    }
    return [name for name, without_use in found.items() if without_use]


def hide_packages(packages: list[str]) -> None:
    """Make packages look as if they were not installed, unless they are imported already.

    None in `sys.modules` is Python's own word for that: `find_spec` finds nothing, and `import` says so. What is
    installed, and in which version, is still known from the metadata.
    """
    if "torch" in packages:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is none
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def restore_package(name: str) -> None:
    """Let a package that was left out be imported after all. Others may have made do without it already."""
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]


def hidden_packages() -> list[str]:
    """What looks as if it was not installed here: to be left out by other processes too."""
    return [name for name, module in sys.modules.items() if module is None]


def limit_onednn_cache() -> None:
    """Let oneDNN, and PyTorch's binding to it, keep little of what they compile for products; before torch is imported.

    Each keeps 1,024 entries of some 0.6 MB otherwise, and rows of ever other lengths need ever other ones:
    memory would grow for hundreds of steps. What the user's environment says goes first.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(ONEDNN_CACHE_ENTRIES))


@contextmanager
def reduced_gc() -> Iterator[None]:
    """Import much in four fifths of the time: the collector does not walk all modules again and again.

    Nor does it in training, where it would make the other ranks wait: they are frozen, until `gc.unfreeze`.
    """
    usual = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.freeze()
