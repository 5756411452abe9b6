"""The fields that a checkpoint is tied to: those that decide which losses follow from it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.report import FailureClass
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import leaves
from finetune_trainer.failures import TrainerError

Identity = dict[str, Any]

FREE_TRAINING_FIELDS = {
    "validateEvery",
    "validationRows",
    "earlyStopping",
    "keepBest",
    "resumeFrom",
    "compile",
    "activationCheckpointing",
    "deterministic",
    "packing",
    "sharedPrefixes",
    "precision",
}
"""Fields of `training` that change how something is computed or what is monitored, not what is computed."""
STARTING_FIELDS = {"tuning.lora.dropout", "tuning.lora.bPlusRatio", "tuning.lora.init", "tuning.prompt.initText"}
"""Fields of `tuning` that decide how weights start or are trained, not what they mean."""


def training_identity(spec: FineTuneJobSpec, model_digest: str, data_digest: str) -> Identity:
    """Field paths and values that a checkpoint is tied to, those of `tuning` only as far as the method uses them."""
    wire = spec.to_wire()
    tuning: Mapping[str, Any] = wire["tuning"]  # type: ignore[assignment]
    training: Mapping[str, Any] = wire["training"]  # type: ignore[assignment]
    kept = {
        "datasets": wire["datasets"],
        "split": wire["split"],
        "tuning": {k: v for k, v in tuning.items() if k in ("method", *spec.tuning.method.traits.blocks)},
        "training": {k: v for k, v in training.items() if k not in FREE_TRAINING_FIELDS},
    }
    return {**dict(leaves(kept)), "model": model_digest, "prepared data": data_digest}


def refuse_other(stored: Identity, current: Identity, where: str) -> None:
    """Raise TrainerError (config-changed) that names the first field in which the two differ."""
    for field in sorted(stored.keys() | current.keys()):
        was, now = stored.get(field), current.get(field)
        if was != now:
            raise TrainerError(
                FailureClass.CONFIG_CHANGED,
                f"{where} was written with {field} = {_shown(was)}, but the job now has {_shown(now)}. "
                "Change it back, or run the new configuration under a new name.",
                field,
            )


def refuse_other_weights(stored: Identity, current: Identity, where: str) -> None:
    """The same for starting from another job's weights: only what the weights mean must agree."""
    # PiSSA subtracts an adapter that depends on the seed from the base: its weights fit that remainder only.
    pissa = [identity.get("tuning.lora.init") == "pissa" for identity in (stored, current)]
    also = {"tuning.lora.init"} if any(pissa) else set()
    also |= {"training.seed"} if all(pissa) else set()
    refuse_other(_of_weights(stored, also), _of_weights(current, also), where)


def _of_weights(identity: Identity, also: set[str]) -> Identity:
    fields = {k for k in identity if k == "model" or k.startswith("tuning.")} - STARTING_FIELDS
    return {k: v for k, v in identity.items() if k in fields | also}


def _shown(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
