"""A GGUF file becomes safetensors once, and is then a model like any other."""

import struct
from pathlib import Path

import pytest
import torch
from tests.support.assets import smollm2_directory, smollm2_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.gguf import convert, load_tokenizer
from finetune_trainer.prepare.models import describe, load_config


def test_the_converted_model_knows_what_it_knew_and_is_converted_only_once() -> None:
    directory = smollm2_directory()
    config = load_config(directory)
    facts = describe(config, directory)
    assert (facts.parameters, facts.num_hidden_layers, facts.vocab_size) == (134_515_008, 30, 49_152)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1]
    assert tokenizer.decode(logits.argmax()).strip() == "Paris"
    written = (directory / "model.safetensors").stat()
    assert convert(smollm2_gguf(), directory.parent) == directory
    assert (directory / "model.safetensors").stat() == written


def test_what_is_no_gguf_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no model at all")
    with pytest.raises(TrainerError, match=r"m\.gguf cannot be converted from GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "models")
    assert not [path for path in (tmp_path / "models").iterdir() if not path.name.endswith(".lock")]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60), "it does not begin as such files do"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 60), "an array has more"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1 << 20), "unknown type"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 62), "a text is longer than"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + text("w") + struct.pack("<I", 1 << 31), "more than 8 dimensions"),
    ],
)
def test_a_header_that_would_be_read_for_ever_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(TrainerError, match=why) as error:
        load_tokenizer(tmp_path / "m.gguf")
    assert error.value.failure_class is FailureClass.BAD_SPEC
