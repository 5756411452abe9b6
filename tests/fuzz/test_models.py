"""Files of a model: headers, indexes, configs and tokenizers are taken or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny import tiny_llama

from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import gguf
from finetune_trainer.prepare.models import count_parameters, describe, load_config
from finetune_trainer.prepare.tokenizer import load_tokenizer
from finetune_trainer.untrusted import check_model_files, tensor_shapes

from .hunting import changed, damaged, hunt


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16)


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


SIZES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
GGUF = b"".join(
    [
        struct.pack("<4sIQQ", b"GGUF", 3, 2, 3 + len(SIZES)),
        gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama"),
        *(gguf_text(f"llama.{name}") + struct.pack("<II", 4, 4) for name in SIZES),
        gguf_text("tokenizer.tokens") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("a") + gguf_text("b"),
        gguf_text("tokenizer.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.0),
        gguf_text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0),
        gguf_text("b.weight") + struct.pack("<IQIQ", 1, 4, 0, 64),
    ]
)


def test_the_header_of_a_gguf_file_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(TrainerError):
            gguf.check_header(path)

    hunt(damaged([GGUF]), read)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def test_the_header_of_a_safetensors_file_gives_shapes_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def write(header: Any) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(24)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(TrainerError):
            assert all(size >= 0 for shape in tensor_shapes(path).values() for size in shape)
            assert count_parameters(tmp_path, tied=True) >= 0

    hunt(damaged([write(HEADER)], (b"[" * 2000, b"1e999", b"\xff")) | changed(HEADER).map(write), read)


INDEX = {
    "metadata": {"total_size": 24},
    "weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model.safetensors"},
}
FILES = ("tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json")


@pytest.mark.parametrize("name", FILES)
def test_what_a_model_says_of_its_files_is_taken_or_refused(name: str, model: Path) -> None:
    path = model / name
    sample = json.loads(path.read_text()) if path.exists() else INDEX

    def read(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(TrainerError):
            check_model_files(model)

    hunt(damaged([json.dumps(sample).encode()]) | changed(sample).map(lambda value: json.dumps(value).encode()), read)


def test_a_config_describes_a_model_or_is_refused(model: Path) -> None:
    path = model / "config.json"
    sample = json.loads(path.read_text())

    def read(config: Any) -> None:
        path.write_text(json.dumps(config))
        with contextlib.suppress(TrainerError):
            describe(load_config(model), model)

    hunt(changed(sample), read)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_is_loaded_or_refused(name: str, model: Path) -> None:
    path = model / name
    sample = json.loads(path.read_text()) if path.exists() else {}
    arguments = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "pad_token": "<pad>"}

    def read(content: Any) -> None:
        path.write_text(json.dumps(content))
        with contextlib.suppress(TrainerError):
            check_model_files(model)
            load_tokenizer(model)

    hunt(changed(sample if name == "tokenizer.json" else sample | arguments), read)
