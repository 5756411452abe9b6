"""Every metric against a published implementation."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.spec import Evaluation
from finetune_api.traits import Task
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.evaluate.metrics import EXTRA, Answer, exact_match, measure, metrics_of, normalised

LABELS = ["a", "b", "c", "never"]
SENTENCES = [
    "The cat sat on the mat.",
    "cat sat",
    "A dog, the dog!",
    "",
    "it's 3.5 o'clock",
    "mats sitting",
    "the a an",
]


def classified(pairs: list[tuple[int, int]]) -> tuple[list[EvaluationRow], list[Answer]]:
    rows = [EvaluationRow("r", "d", "classification", candidates=LABELS, gold=gold) for gold, _ in pairs]
    return rows, [Answer(text=LABELS[said], choice=said) for _, said in pairs]


def answered(pairs: list[tuple[list[str], str]]) -> tuple[list[EvaluationRow], list[Answer]]:
    rows = [EvaluationRow("r", "d", "question-answering", answers=references) for references, _ in pairs]
    return rows, [Answer(text=text) for _, text in pairs]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_accuracy_and_macro_f1_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    gold, said = zip(*pairs, strict=True)
    assert measure("accuracy", *classified(pairs)).value == pytest.approx(accuracy_score(gold, said))
    assert measure("macro-f1", *classified(pairs)).value == pytest.approx(f1_score(gold, said, average="macro"))


def test_a_baseline_that_names_an_unknown_label_is_wrong_and_nothing_else() -> None:
    rows, answers = classified([(0, 0), (1, 1)])
    answers[1] = Answer(text="unheard of")
    assert measure("accuracy", rows, answers).value == 0.5
    assert measure("macro-f1", rows, answers).value == pytest.approx(0.5)


references = st.lists(st.sampled_from([s for s in SENTENCES if normalised(s)]), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(references, st.sampled_from(SENTENCES)), min_size=1))
def test_exact_match_and_f1_are_squads(pairs: list[tuple[list[str], str]]) -> None:
    from torchmetrics.text import SQuAD

    published = SQuAD()
    published.update(
        [{"id": str(i), "prediction_text": said} for i, (_, said) in enumerate(pairs)],
        [{"id": str(i), "answers": {"text": r, "answer_start": [0] * len(r)}} for i, (r, _) in enumerate(pairs)],
    )
    expected = {name: float(value) / 100 for name, value in published.compute().items()}
    assert measure("exact-match", *answered(pairs)).value == pytest.approx(expected["exact_match"], abs=1e-6)
    assert measure("f1", *answered(pairs)).value == pytest.approx(expected["f1"], abs=1e-6)


def test_nothing_is_right_where_nothing_is_the_answer_as_in_squad_2() -> None:
    assert measure("f1", *answered([(["the"], "A.")])).value == 1
    assert measure("f1", *answered([(["the"], "cat")])).value == 0


def test_articles_case_and_punctuation_do_not_count() -> None:
    assert exact_match("The  Eiffel-Tower!", "eiffeltower") == 1
    assert exact_match("tower", "eiffel tower") == 0


def test_rouge_is_rouge_scores_best_reference() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    source = random.Random(0)
    words = ["the", "cat", "sits", "sitting", "on", "mats", "mat", "dog", "runs", "running"]

    def text() -> str:
        return " ".join(source.choices(words, k=source.randrange(1, 9)))

    pairs = [([text() for _ in range(2)], text()) for _ in range(30)]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for ours, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        expected = np.mean([scorer.score_multi(refs, said)[theirs].fmeasure for refs, said in pairs])
        assert measure(ours, *answered(pairs)).value == pytest.approx(expected)


def test_bleu_is_sacrebleus_corpus_bleu() -> None:
    from sacrebleu.metrics.bleu import BLEU

    source = random.Random(1)
    words = ["the", "cat", "sat", "on", "a", "mat", "with", "its", "small", "dog"]

    def text() -> str:
        return " ".join(source.choices(words, k=source.randrange(4, 14)))

    pairs = [([text(), text()], text()) for _ in range(60)]
    said = [text for _, text in pairs]
    streams = [[refs[n] for refs, _ in pairs] for n in range(2)]
    assert measure("bleu", *answered(pairs)).value == pytest.approx(BLEU().corpus_score(said, streams).score)


def test_perplexity_and_loss_are_the_published_ones() -> None:
    from torchmetrics.text import Perplexity

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    targets[1, 4:] = -100
    published = Perplexity(ignore_index=-100)
    published.update(logits, targets)
    answers = []
    for row in range(3):
        kept = targets[row] != -100
        log_probabilities = logits[row].log_softmax(-1)[kept, targets[row][kept]]
        answers.append(Answer(nll=-float(log_probabilities.sum()), tokens=int(kept.sum())))
    rows = [EvaluationRow("r", "d", "text", ids=[1]) for _ in answers]
    assert measure("perplexity", rows, answers).value == pytest.approx(float(published.compute()), rel=1e-5)
    assert measure("neg-loss", rows, answers).value == pytest.approx(-math.log(float(published.compute())), rel=1e-5)


def test_accuracy_of_likelihood_tasks_is_that_of_tokens() -> None:
    rows = [EvaluationRow("r", "d", "text", ids=[1]) for _ in range(2)]
    answers = [Answer(tokens=3, right_tokens=3), Answer(tokens=5, right_tokens=1)]
    assert measure("accuracy", rows, answers).value == 0.5


def test_metrics_that_are_asked_for_come_after_the_tasks_own_and_only_where_they_can_be_measured() -> None:
    field: Any = Evaluation.model_fields["metrics"].annotation
    assert set(field.__args__[0].__args__) == set(EXTRA)
    assert metrics_of(Task.CLASSIFICATION, ["rouge", "perplexity", "accuracy"]) == [
        "accuracy",
        "macro-f1",
        "perplexity",
    ]
    assert metrics_of(Task.QUESTION_ANSWERING, ["rouge"]) == ["f1", "exact-match", "rouge-l", "rouge-1", "rouge-2"]
