"""`finetune crd`."""

from __future__ import annotations

from finetune_api.crd import render


def crd() -> None:
    """Print the CustomResourceDefinition: `finetune crd | kubectl apply --server-side -f -`."""
    print(render(), end="")
