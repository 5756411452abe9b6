"""The header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): enough for a model's shape.

The gguf package would read it, but needs numpy, which the operator's image does not have.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from finetune_operator.errors import UserError

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Value types of fixed size, as struct reads them."""
_STRING, _ARRAY = 8, 9
_LONGEST_TEXT, _MOST_DIMENSIONS = 1 << 24, 8
"""Of a header that is none: the file could claim to hold more than there is memory."""


def gguf_config(path: Path) -> dict[str, Any]:
    """What a config.json would say of the model in this file. Raises UserError if the file is not GGUF."""
    try:
        with path.open("rb") as file:
            metadata, shapes = _header(file)
    except (OSError, struct.error, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}.") from error
    kind = str(metadata.get("general.architecture", ""))
    sizes = {key.removeprefix(f"{kind}."): value for key, value in metadata.items()}
    embedding = shapes.get("token_embd.weight", ())
    vocabulary = embedding[1] if len(embedding) == 2 else sizes.get("vocab_size", 0)
    config = {
        "architectures": [_ARCHITECTURES.get(kind, kind)],
        "hidden_size": sizes.get("embedding_length"),
        "intermediate_size": sizes.get("feed_forward_length"),
        "num_hidden_layers": sizes.get("block_count"),
        "num_attention_heads": sizes.get("attention.head_count"),
        "num_key_value_heads": sizes.get("attention.head_count_kv"),
        "head_dim": sizes.get("attention.key_length") or None,
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in shapes,
        "max_position_embeddings": sizes.get("context_length"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata without arrays, and the shapes of the tensors with the fastest dimension first."""
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensor_count, value_count = struct.unpack("<IQQ", file.read(20))
    if version < 2:
        raise ValueError(f"version {version} is too old")
    metadata = {}
    for _ in range(value_count):
        key = _string(file)
        (kind,) = struct.unpack("<I", file.read(4))
        metadata[key] = _value(file, kind)
    shapes = {}
    for _ in range(tensor_count):
        name = _string(file)
        (dimensions,) = struct.unpack("<I", file.read(4))
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions:,} dimensions")
        shapes[name] = struct.unpack(f"<{dimensions}Q", file.read(8 * dimensions))
        file.read(12)
    return metadata, shapes


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST_TEXT:
        raise ValueError(f"a text has {length:,} bytes")
    return file.read(length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return struct.unpack(_FORMATS[kind], file.read(struct.calcsize(_FORMATS[kind])))[0]
    inner, length = struct.unpack("<IQ", file.read(12))
    if inner in (_STRING, _ARRAY):
        for _ in range(length):
            _value(file, inner)
    else:
        file.seek(struct.calcsize(_FORMATS[inner]) * length, os.SEEK_CUR)
    return None
