"""Free answers: greedy, batched, rows of similar length together; a model that thinks first gets tokens to do so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from finetune_trainer.evaluate.final_answer import AnswerReader, FinalAnswer
from finetune_trainer.evaluate.likelihood import batches_by_size, with_half_batches

RowsDone = Callable[[int], None]
MAX_BATCH = 64
THOUGHT_FACTOR = 16
"""Tokens that a thought may take, as a multiple of those of an answer."""


@torch.inference_mode()
def greedy_answers(
    model: Any,
    reader: AnswerReader,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_batch: int,
    done: RowsDone = lambda _rows: None,
) -> list[FinalAnswer]:
    """The answer in the most probable continuation of each prompt (token ids).

    The model's generation config says what ends an answer. Where `max_new_tokens` end within a thought, generation
    goes on for up to `THOUGHT_FACTOR` times as many; the answer after it has at most `max_new_tokens` again.
    """
    results = [FinalAnswer()] * len(prompts)
    thinking: dict[int, list[int]] = {}
    for batch in _continuations(model, prompts, max_new_tokens, tokens_per_batch):
        for index, ids in batch.items():
            results[index] = reader.read(ids, ended=len(ids) < max_new_tokens)
            if results[index].thought == "unfinished" and len(ids) == max_new_tokens:
                thinking[index] = ids
        done(len(batch.keys() - thinking.keys()))
    indices = list(thinking)
    longer = [[*prompts[index], *thinking[index]] for index in indices]
    more_tokens = _room(model, longer, THOUGHT_FACTOR * max_new_tokens)
    for batch in _continuations(model, longer, more_tokens, tokens_per_batch) if more_tokens else ():
        for number, ids in batch.items():
            index = indices[number]
            answer = reader.read([*thinking[index], *ids], ended=len(ids) < more_tokens)
            results[index] = replace(answer, text=reader.first_tokens(answer.text, max_new_tokens))
        done(len(batch))
    return results


def _continuations(
    model: Any, prompts: Sequence[Sequence[int]], count: int, tokens_per_batch: int
) -> Iterator[dict[int, list[int]]]:
    """Batch by batch, by index: at most `count` tokens after each prompt, without the one that ends them."""

    def fits(rows: int, length: int, _: int) -> bool:
        return rows <= MAX_BATCH and rows * (length + count) <= tokens_per_batch

    for batch in batches_by_size([(len(prompt), 0) for prompt in prompts], fits):
        generated = with_half_batches(batch, lambda part: _generate(model, [prompts[i] for i in part], count))
        yield dict(zip(batch, generated, strict=True))


def _room(model: Any, prompts: Sequence[Sequence[int]], wanted: int) -> int:
    """How many of the wanted tokens the model's context holds after the longest prompt."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    return max(0, min(wanted, context - longest)) if context else wanted


def _generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    pad, ends = model.generation_config.pad_token_id, set(model.generation_config.eos_token_id)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = torch.tensor(prompt)
        mask[b, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens
    )
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens before the first that ends the answer: what follows is padding."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
