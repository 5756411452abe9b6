"""Model FLOPs: what the mathematics of a step needs, not what is computed again.

With N the elements of the decoder's matrices, A those of the adapters, t a document's tokens, L layers, Q the
queries' width, V·H the head's elements: 4N per token for LoRA (2N forward, 2N for the gradient of the input), 6N for
full tuning, 6A per token, attention 2·t²·Q·L forward (causal: half of two products) and twice that backward, head
4·V·H (full: 6) per labelled position. A prefix that is computed once for several documents counts once: what is saved
by sharing is not utilisation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flops:
    """The counts of the formula."""

    matrices: int
    adapters: int
    attention: int
    """Q·L."""
    head: int
    full: bool = False

    def of_step(self, tokens: int, squares: int, labelled: int) -> float:
        """Operations for `tokens` tokens, documents whose squared lengths sum to `squares`, and labelled positions."""
        frozen = 6 if self.full else 4
        per_token = frozen * self.matrices + 6 * self.adapters
        return per_token * tokens + 6 * self.attention * squares + frozen * self.head * labelled


def flops_of(directory: Path, rank: int, full: bool = False) -> Flops:
    """The counts for a model with adapters on all linear layers."""
    from finetune_operator.sizing.model_shapes import model_facts, shape_of

    shape = shape_of(model_facts(json.loads((directory / "config.json").read_text())))
    facts = shape.facts
    adapters = facts.num_hidden_layers * sum(rank * (matrix.out + matrix.into) for matrix in shape.matrices)
    return Flops(
        matrices=shape.active_parameters,
        adapters=0 if full else adapters,
        attention=facts.num_hidden_layers * facts.num_attention_heads * facts.head_dim,
        head=facts.vocab_size * facts.hidden_size,
        full=full,
    )
