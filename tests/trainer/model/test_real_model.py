"""SmolLM2, a real model: documents apart, losses those of transformers, four bits close to sixteen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.assets import smollm2_directory
from tests.support.batches import PAD, Example, packed
from tests.support.loading import load, tuning
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.spec import Quantization
from finetune_trainer.data.packing import collate_packed
from finetune_trainer.data.prefixes import Shared, shared_prefixes
from finetune_trainer.model.nf4 import write_nf4_copy

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Water boils at one hundred degrees.",
    "She opened the letter, read it twice, and put it into the fire without a word.",
)


@pytest.mark.slow
def test_a_real_model_computes_the_same_packed_and_stays_close_in_four_bits(tmp_path: Path) -> None:
    directory = smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    documents = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="np")["input_ids"][0].astype("int32")
        positions = torch.arange(len(ids) - 1, dtype=torch.int32).numpy()
        documents.append(Example(ids, positions, ids[1:], torch.ones(len(positions)).numpy()))

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        alone = [functional.cross_entropy(theirs(d.tokens).logits[0, :-1], d.tokens[0, 1:]) for d in documents]
    del theirs
    expected = float(torch.stack(alone).mean())
    assert 1.0 < expected < 5.0  # of 10.8 for guessing: it has read English

    def loss(method: str, **changes: object) -> float:
        model = load(directory, tuning(method), **changes).eval()
        batch = packed(documents)
        with torch.no_grad():
            losses = model(batch)
        return float(torch.stack([losses[batch.target_document == i].mean() for i in range(len(documents))]).mean())

    assert loss("lora") == pytest.approx(expected, abs=1e-4)
    assert loss("lora", precision=torch.bfloat16) == pytest.approx(expected, abs=0.05)
    write_nf4_copy(directory, tmp_path, Quantization())
    assert loss("qlora", nf4_directory=tmp_path) == pytest.approx(expected, abs=0.5)


INSTRUCTION = "Does this message sound happy, sad or angry? Answer with one word.\nMessage: {}\nAnswer:"
MESSAGES = {
    "The sun is out and we are going to the beach!": " happy",
    "Nobody came to my birthday.": " sad",
    "Stop calling me, I have said no three times already.": " angry",
    "I got the job, I start on Monday": " happy",
}


@pytest.mark.slow
def test_a_real_model_learns_the_same_from_an_instruction_that_is_computed_once() -> None:
    directory = smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    documents: list[Example] = []
    for message, answer in MESSAGES.items():
        ids = tokenizer(INSTRUCTION.format(message) + answer, return_tensors="np")["input_ids"][0].astype("int32")
        position = np.array([len(ids) - 2], np.int32)
        documents.append(Example(ids, position, ids[position + 1], np.ones(1, np.float32)))
    model = load(directory, tuning("lora"))
    with torch.no_grad():
        for name, parameter in model.trainable:
            if ".lora_B." in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))

    def outcome(groups: list[Shared]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        batch = collate_packed(documents, range(4), [d.target_weight for d in documents], PAD, 1, groups)
        losses = model(batch)
        losses.sum().backward()
        assert batch.ids.numel() == sum(len(d.ids) for d in documents) - 3 * sum(group.length for group in groups)
        return losses.detach(), torch.cat([p.grad.flatten() for _, p in model.trainable if p.grad is not None])

    groups = shared_prefixes(documents)
    assert groups[0].length > 15
    (apart, gradient), (shared, same) = outcome([]), outcome(groups)
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)
    assert float((same - gradient).norm() / gradient.norm()) < 1e-4
