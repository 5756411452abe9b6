"""Whether what an earlier attempt has prepared is what this job needs."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from finetune_api.holdout import selects_checkpoint
from finetune_api.runconfig import RunConfig
from finetune_trainer.context import RunContext
from finetune_trainer.data.manifest import PreparedManifest


def config_digest(config: RunConfig) -> str:
    """sha256 of everything in the run config that decides what `prepared/` holds."""
    spec = config.spec
    training, evaluation = spec.training, spec.evaluation
    parts = {
        "model": spec.model.to_wire(),
        "datasets": [dataset.to_wire() for dataset in spec.datasets],
        "split": spec.split.to_wire(),
        "tuning": [spec.tuning.method, spec.tuning.quantization.to_wire(), spec.tuning.virtual_tokens],
        "training": [training.max_sequence_length, selects_checkpoint(spec)],
        "evaluation": [evaluation.few_shot, evaluation.max_rows, evaluation.max_new_tokens, evaluation.gate.to_wire()],
        "paths": [config.paths.source, config.paths.cache],
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def is_prepared(context: RunContext, digest: str) -> bool:
    """Whether `prepared/` was made from that config, and the models that it refers to are still there."""
    try:
        manifest = PreparedManifest.read(context.prepared)
    except (OSError, ValueError):
        return False
    places = (manifest.model.directory, manifest.model.nf4_directory, manifest.model.adapter_directory)
    return manifest.config_digest == digest and all(Path(place).is_dir() for place in places if place)
