"""Free answers: greedy, batched, rows of similar length together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from finetune_trainer.evaluate.likelihood import batches_by_size, with_half_batches

RowsDone = Callable[[int], None]
MAX_BATCH = 64


@torch.inference_mode()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_batch: int,
    done: RowsDone = lambda _rows: None,
) -> list[str]:
    """The most probable continuation of each prompt (token ids), decoded without special tokens, stripped.

    The model's generation config says what ends an answer. Prompts are padded on the left.
    """
    results = [""] * len(prompts)

    def fits(count: int, length: int, _: int) -> bool:
        return count <= MAX_BATCH and count * (length + max_new_tokens) <= tokens_per_batch

    for batch in batches_by_size([(len(prompt), 0) for prompt in prompts], fits):
        generated = with_half_batches(batch, lambda part: _generate(model, [prompts[i] for i in part], max_new_tokens))
        for index, text in zip(batch, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            results[index] = text.strip()
        done(len(batch))
    return results


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
