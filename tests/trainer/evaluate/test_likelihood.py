"""Closed answers in one forward pass give what one sequence per candidate gives, only faster."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny import tiny_llama

from finetune_trainer.evaluate import likelihood
from finetune_trainer.evaluate.likelihood import (
    Budget,
    ClosedQuestion,
    TargetSequence,
    as_sequences,
    plain_scores,
    sequence_scores,
    tree_disagreement,
    tree_of,
    tree_scores,
    with_half_batches,
)

END = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    directory = tiny_llama(tmp_path_factory.mktemp("model"), hidden=32, heads=4, intermediate=64)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        loaded.model.norm.weight.mul_(8)  # logits that differ enough to tell orders apart
    return loaded


tokens = st.integers(4, 30)
candidate = st.lists(tokens, min_size=0, max_size=4).map(lambda ids: (*ids, END))
candidates = st.lists(candidate, min_size=1, max_size=8, unique=True).map(tuple)
prompt = st.lists(tokens, min_size=1, max_size=12).map(tuple)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.builds(ClosedQuestion, prompt, candidates), min_size=1, max_size=5), st.lists(tokens, max_size=12))
def test_trees_give_what_one_sequence_a_candidate_gives(
    model: Any, rows: list[ClosedQuestion], shared: list[int]
) -> None:
    rows = [ClosedQuestion((*shared, *row.prompt), row.candidates) for row in rows]
    for fast, plain in zip(tree_scores(model, rows), plain_scores(model, rows), strict=True):
        assert fast == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_does_not_matter(model: Any, attention: str) -> None:
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        assert tree_disagreement(model, [ClosedQuestion((5, 6, 7), ((8, END), (8, 9, END)))]) < 1e-4
    finally:
        model.set_attn_implementation(before)


def intents(count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    source = random.Random(seed)
    return tuple((*(source.randrange(4, 40) for _ in range(source.randrange(2, 7))), END) for _ in range(count))


def test_77_labels_cost_a_tenth_of_one_sequence_a_label(model: Any) -> None:
    source = random.Random(1)
    named = tuple(source.randrange(4, 200) for _ in range(150))
    labels = intents(77)
    rows = [ClosedQuestion(named + tuple(source.randrange(4, 200) for _ in range(20)), labels) for _ in range(4)]
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, given: fed.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        fast = tree_scores(model, rows)
        of_trees, fed[:] = sum(fed), []
        plain = plain_scores(model, rows)
    finally:
        hook.remove()
    assert 10 * of_trees < sum(fed)
    for a, b in zip(fast, plain, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_score_is_the_sum_of_log_probabilities_with_the_end_token(model: Any) -> None:
    row = ClosedQuestion((5, 6, 7), ((8, 9, END),))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    expected = logits[2, 8] + logits[3, 9] + logits[4, END]
    assert tree_scores(model, [row])[0] == pytest.approx([float(expected)], abs=1e-5)


def test_a_label_that_begins_another_does_not_win_by_being_shorter() -> None:
    tree = tree_of(((8, END), (8, 9, END)))
    assert tree.tokens == (8, 9)
    scores = [len(path) for path in tree.paths]
    assert scores == [2, 3]
    assert tree.edges[tree.paths[0][1]] == (1, END)


def test_batches_do_not_change_scores(model: Any) -> None:
    source = random.Random(2)
    rows = [ClosedQuestion(tuple(source.randrange(4, 99) for _ in range(n)), intents(5, n)) for n in range(3, 40, 4)]
    alone = [tree_scores(model, [row])[0] for row in rows]
    for budget in (Budget(tokens=1), Budget(tokens=120), Budget()):
        for a, b in zip(alone, tree_scores(model, rows, budget), strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_progress_counts_every_row_once(model: Any) -> None:
    counted: list[int] = []
    tree_scores(model, [ClosedQuestion((5, n), ((8, END),)) for n in range(7)], Budget(tokens=4), counted.append)
    assert sum(counted) == 7
    assert len(counted) > 1


def test_documents_are_scored_at_their_targets_whatever_stands_beside_them(model: Any) -> None:
    sequences = [
        TargetSequence((5, 6, 7, 8), (0, 2), (6, 8)),
        TargetSequence(tuple(range(10, 30)), tuple(range(19)), tuple(range(11, 30))),
        TargetSequence((9, 9), (), ()),
    ]
    scored = sequence_scores(model, sequences)
    for sequence, found in zip(sequences, scored, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        expected = [float(logits[p, t]) for p, t in zip(sequence.positions, sequence.targets, strict=True)]
        assert list(found.log_probabilities) == pytest.approx(expected, abs=1e-4)
        best = [int(logits[p].argmax()) == t for p, t in zip(sequence.positions, sequence.targets, strict=True)]
        assert found.right == sum(best)


def test_a_candidate_continues_the_prompt_without_a_gap() -> None:
    sequence = as_sequences(ClosedQuestion((5, 6), ((8, 9, END),)))[0]
    assert sequence == TargetSequence((5, 6, 8, 9), (1, 2, 3), (8, 9, END))


def test_a_model_that_ignores_masks_is_found_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(model).forward

    def without_mask(self: Any, **given: Any) -> Any:
        return forward(self, **(given | {"attention_mask": None}))

    rows = [ClosedQuestion((5, 6, 7), ((8, 9, END), (8, 10, END), (11, 8, END)))]
    assert tree_disagreement(model, rows) < 1e-4
    monkeypatch.setattr(likelihood, "_additive", lambda visible, of: torch.zeros(visible.shape)[:, None])
    assert tree_disagreement(model, rows) > 1e-2
    monkeypatch.setattr(type(model), "forward", without_mask)
    assert tree_disagreement(model, rows) > 1e-2


def test_a_model_that_takes_no_such_arguments_is_found_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(model).forward

    def picky(self: Any, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None, **rest: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("no 4-D masks")
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **rest)

    monkeypatch.setattr(type(model), "forward", picky)
    assert tree_disagreement(model, [ClosedQuestion((5, 6), ((8, END),))]) == float("inf")


def test_a_batch_too_large_for_the_gpu_is_halved_and_a_single_row_is_not() -> None:
    tried: list[int] = []

    def compute(part: list[int]) -> list[int]:
        tried.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return [10 * i for i in part]

    assert with_half_batches([1, 2, 3, 4, 5], compute) == [10, 20, 30, 40, 50]
    assert tried == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        with_half_batches([1], lambda _part: (_ for _ in ()).throw(torch.OutOfMemoryError("still")))
