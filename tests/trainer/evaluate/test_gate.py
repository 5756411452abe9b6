"""The gate as a table: what was measured, and what is said."""

from __future__ import annotations

import pytest

from finetune_api.report import Interval, MetricResult
from finetune_api.spec import Gate
from finetune_trainer.evaluate.gate import decide_gate


def line(dataset: str, low: float, high: float, *, rows: int = 300, tuned: float = 0.7) -> MetricResult:
    middle = (low + high) / 2
    difference = Interval(value=middle, low=low, high=high)
    return MetricResult(
        dataset=dataset, metric="accuracy", rows=rows, primary=True, base=tuned - middle, tuned=tuned,
        difference=difference,
    )  # fmt: skip


BETTER, EQUAL, WORSE = line("one", 0.1, 0.2), line("two", -0.1, 0.1), line("three", -0.2, -0.1)
UP, FLAT = line("macro", 0.02, 0.1), line("macro", -0.01, 0.1)

TABLE = {
    "better on the mean and nowhere worse": ([BETTER, EQUAL, UP], Gate(), True, "improved"),
    "better on the mean but worse on one dataset": ([BETTER, WORSE, UP], Gate(), False, "worse"),
    "not significantly better on the mean": ([BETTER, EQUAL, FLAT], Gate(), False, "not-significant"),
    "the mean over one dataset is that dataset": ([BETTER, FLAT], Gate(), True, "improved"),
    "a lower bound of exactly 0 is not above 0": (
        [EQUAL, BETTER, line("macro", 0, 0.1)], Gate(), False, "not-significant",
    ),
    "an upper bound of exactly 0 is not below 0": ([BETTER, line("b", -0.1, 0), UP], Gate(), True, "improved"),
    "too few rows of one dataset": ([BETTER, line("few", 0.1, 0.2, rows=29), UP], Gate(), False, "undecided"),
    "30 rows are enough": ([line("few", 0.1, 0.2, rows=30), UP], Gate(), True, "improved"),
    "no dataset at all": ([], Gate(), False, "undecided"),
    "nothing measured and nothing asked for": ([], Gate(must_improve=False), True, "not-measured"),
    "nothing measured, but a minimum": (
        [], Gate(must_improve=False, minimum={"one/accuracy": 0.5}), False, "below-minimum",
    ),
    "too few rows, but no improvement asked for": (
        [line("few", 0.1, 0.2, rows=3), UP], Gate(must_improve=False), True, "not-asked",
    ),
    "worse, but no improvement asked for": ([WORSE], Gate(must_improve=False), True, "not-asked"),
    "a minimum that is met": ([BETTER, UP], Gate(minimum={"one/accuracy": 0.7}), True, "improved"),
    "a minimum that is missed": ([BETTER, UP], Gate(minimum={"one/accuracy": 0.71}), False, "below-minimum"),
    "a minimum alone": ([WORSE], Gate(must_improve=False, minimum={"three/accuracy": 0.5}), True, "not-asked"),
    "a minimum of something not measured": ([BETTER, UP], Gate(minimum={"one/f1": 0.1}), False, "below-minimum"),
    "a value that is not a number misses its minimum": (
        [line("one", 0.1, 0.2, tuned=float("nan")), UP], Gate(minimum={"one/accuracy": 0}), False, "below-minimum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_the_gate(case: str) -> None:
    metrics, gate, passed, reason = TABLE[case]
    outcome = decide_gate(gate, metrics, baseline=True)
    assert (outcome.passed, outcome.reason) == (passed, reason)
    assert outcome.sentence.endswith((".", ")."))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("too few rows of one dataset", "Undecided: too few held-out rows in few (29); each dataset needs at least 30"),
        (
            "better on the mean but worse on one dataset",
            "three accuracy dropped by 15.0 points (95% interval -20.0 to -10.0)",
        ),
        ("not significantly better on the mean", "Not significant: the mean over datasets improved by 4.5 points"),
        ("a minimum that is missed", "one/accuracy is 0.7, below the minimum of 0.71."),
        ("a minimum of something not measured", "one/f1 of evaluation.gate.minimum was not measured. Available: one/"),
        ("better on the mean and nowhere worse", "Better than the base model: the mean over datasets improved by 6"),
    ],
)
def test_the_sentence_says_why(case: str, words: str) -> None:
    metrics, gate, _, _ = TABLE[case]
    assert words in decide_gate(gate, metrics, baseline=True).sentence


def test_without_a_baseline_only_minimum_metrics_count() -> None:
    measured = [line("one", 0, 0).model_copy(update={"base": None, "difference": None})]
    outcome = decide_gate(Gate(), measured, baseline=False)
    assert (outcome.passed, outcome.reason) == (True, "not-asked")
    assert "evaluation.baseline: false" in outcome.sentence
    assert not decide_gate(Gate(minimum={"one/accuracy": 0.9}), measured, baseline=False).passed
