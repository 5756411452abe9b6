"""A GGUF file as a directory of safetensors, made once: GGUF weights cannot be trained or sharded as they are."""

from __future__ import annotations

import logging
from pathlib import Path

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import made_once, sha256_of
from finetune_trainer.startup import restore_package

log = logging.getLogger(__name__)

DTYPE = "bfloat16"
WHY_BFLOAT16 = "the usual precision of such models, and finer than their quantised blocks"


def converted_directory(path: Path, models: Path) -> Path:
    """Where the conversion of that file lies or will lie: keyed by its content and the data type."""
    return models / f"gguf-{sha256_of(path)[:32]}-{DTYPE}"


def convert(path: Path, models: Path) -> Path:
    """Directory with config, safetensors (bfloat16) and tokenizer made from a GGUF file.

    Raises TrainerError (bad-spec) where the file is none or its architecture is not known to transformers.
    """
    return made_once(converted_directory(path, models), lambda aside: _write(path, aside))


def load_tokenizer(path: Path) -> object:
    """The tokenizer inside a GGUF file."""
    restore_package("torch")  # with which such files are read
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise _unreadable(path, error) from error


def _write(path: Path, directory: Path) -> None:
    restore_package("torch")
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise _unreadable(path, error) from error
    # The weights were dequantised in loading: without these marks they are saved as what they now are.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)  # type: ignore[attr-defined]


def _unreadable(path: Path, error: Exception) -> TrainerError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TrainerError(
        FailureClass.BAD_SPEC, f"{path.name} cannot be converted from GGUF: {reason[:300]}", "model.path"
    )
