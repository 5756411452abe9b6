"""A GGUF file as a directory of safetensors, made once: GGUF weights cannot be trained or sharded as they are."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any, BinaryIO

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import made_once, sha256_of
from finetune_trainer.startup import restore_package

log = logging.getLogger(__name__)

DTYPE = "bfloat16"
MOST_ENTRIES = 1 << 16
"""Keys, and tensors, of a file at most."""
MOST_ELEMENTS = 1 << 23
"""Elements of all arrays of a file together; they hold its vocabulary. The library keeps an object for each."""
LONGEST_TEXT = 1 << 24
"""Bytes of a key or text; a chat template is one."""
MOST_DIMENSIONS = 8
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
"""Types of values: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
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

    check_header(path)
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


def check_header(path: Path) -> None:
    """Raise TrainerError (bad-spec) if the file says of itself what the library would take for ever to read."""
    try:
        with path.open("rb") as file:
            magic, _, tensors, keys = _unpack(file, "<4sIQQ")
            _bound(magic == b"GGUF" and max(tensors, keys) <= MOST_ENTRIES, "it does not begin as such files do")
            elements = 0
            for _ in range(keys):
                _skip_text(file)
                elements += _skip_value(file, *_unpack(file, "<I"))
                _bound(elements <= MOST_ELEMENTS, f"its arrays have more than {MOST_ELEMENTS:,} elements")
            for _ in range(tensors):
                _skip_text(file)
                (dimensions,) = _unpack(file, "<I")
                _bound(dimensions <= MOST_DIMENSIONS, f"a tensor has more than {MOST_DIMENSIONS} dimensions")
                _unpack(file, f"<{dimensions}QIQ")
    except (ValueError, struct.error) as error:
        raise _unreadable(path, error) from error


def _skip_value(file: BinaryIO, kind: int) -> int:
    """Read over a value; returns how many elements it has, 0 if it is no array."""
    if kind == _TEXT:
        _skip_text(file)
    elif kind != _ARRAY:
        _unpack(file, f"{_bytes_of(kind)}x")
    else:
        inner, count = _unpack(file, "<IQ")
        _bound(count <= MOST_ELEMENTS, f"an array has more than {MOST_ELEMENTS:,} elements")
        if inner != _TEXT:
            _unpack(file, f"{count * _bytes_of(inner)}x")
        else:
            for _ in range(count):
                _skip_text(file)
        return int(count)
    return 0


def _skip_text(file: BinaryIO) -> None:
    (length,) = _unpack(file, "<Q")
    _bound(length <= LONGEST_TEXT, f"a text is longer than {LONGEST_TEXT:,} bytes")
    _unpack(file, f"{length}x")


def _bytes_of(kind: int) -> int:
    _bound(kind in _SCALAR_BYTES, f"it has values of an unknown type ({kind})")
    return _SCALAR_BYTES[kind]


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _bound(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _unreadable(path: Path, error: Exception) -> TrainerError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TrainerError(
        FailureClass.BAD_SPEC, f"{path.name} cannot be converted from GGUF: {reason[:300]}", "model.path"
    )
