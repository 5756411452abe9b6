"""Every architecture: what training computes is what plain transformers and PEFT compute, before it and of the export.

The usual ones run with all tests; `make test-architectures` runs all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from tests.support.architectures import ARCHITECTURES, USUAL, tiny_architecture
from tests.support.batches import examples, packed, padded
from tests.support.loading import load, tuning
from tests.support.tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from finetune_api.architectures import never_packs
from finetune_api.spec import Tuning
from finetune_trainer.export import Base, export_model
from finetune_trainer.model.build import CausalModel

ALL = os.environ.get("FINETUNE_ALL_ARCHITECTURES")
NAMES = tuple(ARCHITECTURES) if ALL else USUAL
LENGTHS = (5, 17, 9, 3)


def batch_for(model: CausalModel) -> Any:
    return (packed if model.packs else padded)(examples(LENGTHS))


def trained(model: CausalModel) -> NDArray[Any]:
    """Losses after three steps that change much."""
    batch = batch_for(model)
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trainable], lr=2e-2, eps=1e-3)
    for _ in range(3):
        model(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model.eval()(batch).numpy()


def as_users_load_it(base: Path, export: Path | None = None) -> NDArray[Any]:
    """The losses of the documents, each alone, by transformers and PEFT."""
    adapter = export is not None and (export / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(base if adapter or export is None else export, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, export)
    found = []
    for document in examples(LENGTHS):
        with torch.no_grad():
            logits = model.eval()(input_ids=document.tokens).logits[0, :-1].log_softmax(-1)
        found.append(-logits.gather(1, document.tokens[0, 1:, None])[:, 0])
    return torch.cat(found).numpy()


def write(model: CausalModel, directory: Path, out: Path, format: str) -> Path:
    base = Base(directory, "acme/base")
    fixed: dict[str, Any] = {"tokenizer": directory / "tokenizer", "end_token_ids": [2], "pad_token_id": 3}
    export_model(model, directory=out, base=base, format=format, **fixed)  # type: ignore[arg-type]
    return out


def assert_equal(found: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_its_exports_compute_what_plain_libraries_compute(tmp_path: Path, name: str) -> None:
    directory = tiny_architecture(tmp_path / "model", name)
    tiny_tokenizer(directory / "tokenizer")
    plain = as_users_load_it(directory)

    def compare(how: Tuning, *formats: str) -> None:
        model = load(directory, how)
        assert model.packs == (not never_packs(type(model.causal_lm).__name__))
        with torch.no_grad():
            assert_equal(model.eval()(batch_for(model)).numpy(), plain)
        losses = trained(model.train())
        assert np.abs(losses - plain).max() > 0.1
        for format in formats:
            out = write(model, directory, tmp_path / f"{how.method}-{format}", format)
            assert_equal(as_users_load_it(directory, out), losses)

    compare(tuning("lora", rank=2), "adapter", "merged")
    compare(tuning("full"), "model")


@pytest.mark.skipif(not ALL, reason=f"{len(ARCHITECTURES) - len(USUAL)} further architectures: make test-architectures")
def test_the_others_were_compared_too() -> None:
    assert set(NAMES) == set(ARCHITECTURES)
