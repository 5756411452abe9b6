"""Greedy answers do not depend on who is in the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import tiny_llama

from finetune_trainer.evaluate.generation import greedy_answers


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    directory: Path = tiny_llama(tmp_path_factory.mktemp("model"), hidden=32, heads=4, intermediate=64, seed=3)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Every letter "e" ends an answer here: a random model never says its own end token.
    ends = [tokenizer.convert_tokens_to_ids("e"), *range(60, 120)]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def test_batched_answers_are_those_of_each_prompt_alone(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [tokenizer(text).input_ids for text in ("a", "What is this?", "sun " * 9, "rain and fog")]
    how = {"max_new_tokens": 12, "tokens_per_batch": 10_000}
    alone = [greedy_answers(model, tokenizer, [prompt], **how)[0] for prompt in prompts]
    assert greedy_answers(model, tokenizer, prompts, **how) == alone
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=12, tokens_per_batch=1) == alone
    ends = {tokenizer.decode([token]) for token in model.generation_config.eos_token_id}
    assert len({len(answer) for answer in alone}) > 1
    assert not any(end in answer for answer in alone for end in ends if end.strip())


def test_an_answer_has_at_most_the_tokens_it_may_have(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    answers = greedy_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=2, tokens_per_batch=100)
    assert len(tokenizer(answers[0]).input_ids) <= 2
