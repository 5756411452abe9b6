"""Intervals: paired, reproducible, and those of a published bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from finetune_api.traits import Task
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.evaluate.bootstrap import interval, resampled_values
from finetune_trainer.evaluate.compare import DatasetAnswers, compare, confusion, label_table, score_changes
from finetune_trainer.evaluate.metrics import Answer, measure

LABELS = ["no", "yes"]


def rows(gold: np.ndarray) -> list[EvaluationRow]:
    return [EvaluationRow(f"d/{i}", "d", "classification", candidates=LABELS, gold=int(g)) for i, g in enumerate(gold)]


def answers(said: np.ndarray) -> list[Answer]:
    return [Answer(text=LABELS[int(s)], choice=int(s), scores=(-1.0, -2.0), nll=1.0, tokens=2) for s in said]


def dataset(name: str, gold: np.ndarray, base: np.ndarray | None, tuned: np.ndarray) -> DatasetAnswers:
    return DatasetAnswers(
        name, Task.CLASSIFICATION, rows(gold), answers(tuned), answers(base) if base is not None else None
    )


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    gold = random.integers(0, 2, 200)
    base = np.where(random.random(200) < 0.6, gold, 1 - gold)
    tuned = np.where(random.random(200) < 0.8, gold, 1 - gold)
    return gold, base, tuned


def test_the_interval_is_scipys_paired_percentile_interval(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    from scipy.stats import bootstrap
    from sklearn.metrics import f1_score

    def macro_f1_score(gold: np.ndarray, said: np.ndarray) -> float:
        hits = [((gold == label) & (said == label)).sum() for label in (0, 1)]
        counts = [(gold == label).sum() + (said == label).sum() for label in (0, 1)]
        return float(np.mean([2 * h / c for h, c in zip(hits, counts, strict=True)]))

    gold, base, tuned = data
    assert macro_f1_score(gold, tuned) == pytest.approx(f1_score(gold, tuned, average="macro"))
    accuracy, macro_f1 = (one.result.difference for one in compare([dataset("d", gold, base, tuned)], [])[:2])
    published = [
        lambda g, b, t: np.mean(g == t) - np.mean(g == b),
        lambda g, b, t: macro_f1_score(g, t) - macro_f1_score(g, b),
    ]
    for ours, statistic, resamples in zip((accuracy, macro_f1), published, (5000, 4000), strict=True):
        theirs = bootstrap(
            (gold, base, tuned), statistic, paired=True, vectorized=False, n_resamples=resamples,
            method="percentile", rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        assert ours is not None
        assert ours.value == pytest.approx(statistic(gold, base, tuned))
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.012)


def test_the_same_rows_give_the_same_interval(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    one, two = (compare([dataset("d", *data)], ["perplexity"]) for _ in range(2))
    assert [c.result for c in one] == [c.result for c in two]


def test_pairing_makes_the_interval_of_equal_models_a_point(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    gold, base, _ = data
    difference = compare([dataset("d", gold, base, base)], [])[0].result.difference
    assert difference is not None
    assert (difference.low, difference.value, difference.high) == (0, 0, 0)


def test_resamples_of_one_statistic_have_its_sampling_spread() -> None:
    gold = np.arange(100) % 2
    one = measure("accuracy", rows(gold), answers(np.where(np.arange(100) < 70, gold, 1 - gold)))
    values = resampled_values([one], seed=1)[0]
    assert values.mean() == pytest.approx(0.7, abs=0.005)
    assert values.std() == pytest.approx(np.sqrt(0.7 * 0.3 / 100), rel=0.05)
    assert interval(0.7, values).low == pytest.approx(0.61, abs=0.02)


def test_the_macro_mean_weighs_datasets_not_rows(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    gold, base, tuned = data
    compared = compare([dataset("large", gold, base, tuned), dataset("small", gold[:40], tuned[:40], base[:40])], [])
    large, small, macro = (c.result for c in compared if c.result.primary)
    assert macro.dataset == "macro"
    assert compared[-1].result is macro
    assert macro.tuned == pytest.approx((large.tuned + small.tuned) / 2)
    assert macro.difference is not None
    assert large.difference is not None
    assert small.difference is not None
    assert macro.difference.value == pytest.approx((large.difference.value + small.difference.value) / 2)
    assert small.difference.high - small.difference.low > macro.difference.high - macro.difference.low
    assert macro.rows == 240


def test_a_difference_is_tuned_minus_base_also_where_less_is_better() -> None:
    row = [EvaluationRow("t/0", "t", "text", ids=[1, 2])] * 40
    answered = DatasetAnswers("t", Task.TEXT, row, [Answer(nll=1.0, tokens=1)] * 40, [Answer(nll=2.0, tokens=1)] * 40)
    by_name = {c.result.metric: c for c in compare([answered], []) if c.result.dataset == "t"}
    assert by_name["neg-loss"].result.difference is not None
    assert by_name["neg-loss"].result.difference.value == pytest.approx(1.0)
    assert by_name["perplexity"].result.difference is not None
    assert by_name["perplexity"].result.difference.value == pytest.approx(np.e - np.e**2)
    assert by_name["perplexity"].advantage["base"].value > 0


def test_without_a_base_there_is_no_difference(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    gold, _, tuned = data
    for one in compare([dataset("d", gold, None, tuned)], []):
        assert one.result.base is None
        assert one.result.difference is None


def test_label_table_and_confusion_matrix_are_scikit_learns(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    from sklearn.metrics import classification_report

    gold, base, tuned = data
    answered = dataset("d", gold, base, tuned)
    report = classification_report(gold, tuned, target_names=LABELS, output_dict=True)
    for line in label_table(answered, LABELS):
        assert (line.precision, line.recall, line.f1, line.rows) == pytest.approx(
            tuple(report[line.label][name] for name in ("precision", "recall", "f1-score", "support"))
        )
    matrix = confusion(answered.rows, answered.tuned, 2)
    assert matrix[1, 0] == ((gold == 1) & (tuned == 0)).sum()
    assert matrix.sum() == 200


def test_rows_put_right_and_got_wrong_are_told_apart(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    gold, base, tuned = data
    fixed, broken = score_changes(dataset("d", gold, base, tuned))
    assert len(fixed) == ((base != gold) & (tuned == gold)).sum()
    assert len(broken) == ((base == gold) & (tuned != gold)).sum()
