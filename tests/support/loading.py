"""`load_model` with the arguments that a test does not care about filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from finetune_api.spec import Tuning
from finetune_trainer.model.build import CausalModel, load_model


def tuning(method: str = "lora", **fields: Any) -> Tuning:
    """A Tuning from camelCase fields of its `lora` (or of the method's own part)."""
    part = method if method in ("prompt", "prefix") else "lora"
    return Tuning.model_validate({"method": method, part: fields})


def load(directory: Path, how: Tuning | None = None, **changes: Any) -> CausalModel:
    """A model on the CPU in float32; sharded if this process is a rank."""
    how = how or tuning()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None
    fixed = {"precision": torch.float32, "device": torch.device("cpu"), "mesh": mesh, "seed": 1}
    return load_model(directory=directory, method=how.method, tuning=how, **(fixed | changes))
