"""Faster start and less memory: imports only what the job needs, with fewer garbage collections and a smaller cache.

docs/performance.md has the cost of each.
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
"""New objects that trigger a collection of the youngest generation while modules are imported (usually 700)."""

ONEDNN_CACHE_ENTRIES = 64
"""Matrix products, by operand sizes, whose compiled code is kept on a CPU: more than a step over one row has."""


def unused_packages(spec: FineTuneJobSpec, stage: Stage, gpus: int | None) -> list[str]:
    """Installed packages that other packages import if they are there, but that this process does not use.

    `gpus` is the number per node, None if unknown. A model that comes with its own code may need any of them.
    """
    if spec.model.trust_remote_code:
        return []
    unused = {
        "bitsandbytes": not spec.tuning.method.traits.four_bit,  # PEFT imports it, for 4-bit layers
        "triton": gpus == 0,  # torch imports it, to compile for GPUs
        "scipy": stage is Stage.TRAIN,  # transformers imports it, for losses of object detection
        # Tokenizers and configs need none, and transformers imports it: 700 MB in each process.
        "torch": stage is Stage.PREPARE and not spec.tuning.method.traits.four_bit,
    }
    return [name for name, is_unused in unused.items() if is_unused]


def hide_packages(packages: list[str]) -> None:
    """Make packages look as if they were not installed, unless they are already imported.

    That is what None in `sys.modules` means: `find_spec` finds nothing, and `import` fails. The metadata still has
    the installed versions.
    """
    if "torch" in packages:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing torch
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def restore_package(name: str) -> None:
    """Allow a hidden package to be imported. Other packages may already have been imported without it."""
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]


def hidden_packages() -> list[str]:
    """The packages hidden in this process, to be hidden in its children too."""
    return [name for name, module in sys.modules.items() if module is None]


def limit_onednn_cache() -> None:
    """Limit the caches of compiled matrix products in oneDNN and in PyTorch's binding; call before torch is imported.

    By default each keeps 1,024 entries of some 0.6 MB, and every new row length adds entries, so memory would grow
    for hundreds of steps. Values in the user's environment take precedence.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(ONEDNN_CACHE_ENTRIES))


@contextmanager
def reduced_gc() -> Iterator[None]:
    """Collect garbage less often while modules are imported, which saves a fifth of the time.

    Afterwards the modules are frozen until `gc.unfreeze`: in training, a full collection would delay the other ranks.
    """
    previous = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD, *previous[1:])
    try:
        yield
    finally:
        gc.set_threshold(*previous)
        gc.freeze()
