"""Greedy answers do not depend on who is in the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import tiny_llama

from finetune_trainer.evaluate.final_answer import AnswerReader, FinalAnswer
from finetune_trainer.evaluate.generation import THOUGHT_FACTOR, greedy_answers


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


def texts(model: Any, tokenizer: Any, prompts: list[list[int]], **how: int) -> list[str]:
    return [answer.text for answer in greedy_answers(model, AnswerReader(tokenizer), prompts, **how)]


def test_batched_answers_are_those_of_each_prompt_alone(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [tokenizer(text).input_ids for text in ("a", "What is this?", "sun " * 9, "rain and fog")]
    how = {"max_new_tokens": 12, "tokens_per_batch": 10_000}
    alone = [texts(model, tokenizer, [prompt], **how)[0] for prompt in prompts]
    assert texts(model, tokenizer, prompts, **how) == alone
    assert texts(model, tokenizer, prompts, max_new_tokens=12, tokens_per_batch=1) == alone
    ends = {tokenizer.decode([token]) for token in model.generation_config.eos_token_id}
    assert len({len(answer) for answer in alone}) > 1
    assert not any(end in answer for answer in alone for end in ends if end.strip())


def test_an_answer_has_at_most_the_tokens_it_may_have(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    answers = texts(model, tokenizer, [[5, 6, 7]], max_new_tokens=2, tokens_per_batch=100)
    assert len(tokenizer(answers[0]).input_ids) <= 2


class Scripted:
    """A model that goes on with a text of its own, from wherever its prompt leaves it."""

    def __init__(self, tokenizer: Any, script: str, context: int) -> None:
        from types import SimpleNamespace

        self.script = [*tokenizer(script).input_ids, tokenizer.eos_token_id]
        self.generation_config = SimpleNamespace(eos_token_id=[tokenizer.eos_token_id], pad_token_id=0)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=context))
        self.device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        said = int(attention_mask.sum()) - 3
        more = self.script[said : said + max_new_tokens]
        return torch.cat([input_ids, torch.tensor([more])], dim=1)


@pytest.mark.parametrize(
    ("script", "context", "expected"),
    [
        ("<think>hm</think>in Bern", 2048, FinalAnswer("in Bern", "finished")),
        (f"<think>{'hm' * 30}</think>in Bern", 2048, FinalAnswer("in Bern", "finished")),
        (f"<think>{'hm' * 30}</think>{'very long ' * 9}", 2048, FinalAnswer("very long very long very", "finished")),
        (f"<think>{'hm' * 30}</think>in Bern", 30, FinalAnswer("", "unfinished")),
        (f"<think>{'hm' * 10_000}", 100_000, FinalAnswer("", "unfinished")),
        ("<think>hm", 2048, FinalAnswer("", "unfinished")),
        (f"{'very long ' * 9}", 2048, FinalAnswer("very long very long very")),
    ],
)
def test_a_model_that_thinks_gets_the_tokens_to_do_so_within_bounds(
    loaded: tuple[Any, Any], script: str, context: int, expected: FinalAnswer
) -> None:
    import copy

    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.add_tokens(["<think>", "</think>"])
    model, counted = Scripted(tokenizer, script, context), []
    reader = AnswerReader(tokenizer)
    [answer] = greedy_answers(model, reader, [[5, 6, 7]], max_new_tokens=25, tokens_per_batch=100, done=counted.append)
    assert answer == expected
    assert sum(counted) == 1
    assert THOUGHT_FACTOR * 25 < 10_000
