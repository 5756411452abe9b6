"""The backends that an operator can be told to use, by name. One an operator: it watches one kind of child."""

from __future__ import annotations

from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.manifests.trainjob import TrainJobBackend

BACKENDS: dict[str, Backend] = {"pytorchjob": PyTorchJobBackend(), "trainjob": TrainJobBackend()}
