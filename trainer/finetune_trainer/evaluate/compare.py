"""From answers to results: values, paired differences with intervals, baselines beside, the macro-mean last. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from finetune_api.report import Interval, MetricResult
from finetune_api.traits import Task
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.evaluate.bootstrap import SEED, interval, resampled_values
from finetune_trainer.evaluate.gate import MACRO
from finetune_trainer.evaluate.metrics import LOWER_IS_BETTER, Answer, measure, metrics_of, row_score

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DatasetAnswers:
    """One dataset with everybody's answers to its held-out rows."""

    name: str
    task: Task
    rows: list[EvaluationRow]
    tuned: list[Answer]
    base: list[Answer] | None = None
    baselines: dict[str, list[Answer]] = field(default_factory=dict)

    @property
    def everybody(self) -> dict[str, list[Answer]]:
        """By `tuned`, `base` and the baselines' names."""
        return {"tuned": self.tuned, **({"base": self.base} if self.base is not None else {}), **self.baselines}


@dataclass(frozen=True)
class MetricComparison:
    """One metric of one dataset, with an interval for everything that was measured."""

    result: MetricResult
    values: dict[str, Interval]
    """By `tuned`, `base` and the baselines' names."""
    advantage: dict[str, Interval]
    """Tuned minus each of the others, paired; positive is better."""


def compare(datasets: Sequence[DatasetAnswers], asked: Sequence[str]) -> list[MetricComparison]:
    """Every metric of every dataset and, last, the mean of the primary metrics over datasets."""
    compared: list[MetricComparison] = []
    macro: list[tuple[MetricResult, dict[str, Float64]]] = []
    for index, dataset in enumerate(datasets):
        names = metrics_of(dataset.task, asked)
        for name in names if dataset.rows else []:
            one, resampled = _compare_one(
                dataset, name, primary=name == dataset.task.traits.primary_metric, seed=SEED + index
            )
            compared.append(one)
            if one.result.primary:
                macro.append((one.result, resampled))
    return [*compared, *([_macro(macro)] if macro else [])]


def _compare_one(
    dataset: DatasetAnswers, name: str, *, primary: bool, seed: int
) -> tuple[MetricComparison, dict[str, Float64]]:
    answered = {who: answers for who, answers in dataset.everybody.items() if _answers_metric(name, answers)}
    measures = {who: measure(name, dataset.rows, answers) for who, answers in answered.items()}
    resampled = dict(zip(measures, resampled_values(list(measures.values()), seed), strict=True))
    values = {who: interval(m.value, resampled[who]) for who, m in measures.items()}
    sign = -1.0 if name in LOWER_IS_BETTER else 1.0
    advantage = {
        who: interval(sign * (measures["tuned"].value - m.value), sign * (resampled["tuned"] - resampled[who]))
        for who, m in measures.items()
        if who != "tuned"
    }
    difference = advantage.get("base")
    if difference is not None and sign < 0:
        difference = Interval(value=-difference.value, low=-difference.high, high=-difference.low)
    result = MetricResult(
        dataset=dataset.name,
        metric=name,
        rows=len(dataset.rows),
        primary=primary,
        base=measures["base"].value if "base" in measures else None,
        tuned=measures["tuned"].value,
        difference=difference,
        baselines={who: measures[who].value for who in dataset.baselines if who in measures},
    )
    return MetricComparison(result, values, advantage), resampled


def _answers_metric(name: str, answers: Sequence[Answer]) -> bool:
    """Baselines that only name a label have no likelihood."""
    return name not in ("neg-loss", "perplexity") or any(answer.tokens for answer in answers)


def _macro(primary: Sequence[tuple[MetricResult, dict[str, Float64]]]) -> MetricComparison:
    """Mean over datasets. Each dataset's rows are resampled on their own: the interval is that of these datasets."""
    results = [result for result, _ in primary]
    metrics = {result.metric for result in results}
    whose = [who for who in ("tuned", "base") if all(who in resampled for _, resampled in primary)]
    means = {who: np.mean([resampled[who] for _, resampled in primary], axis=0) for who in whose}
    tuned = float(np.mean([result.tuned for result in results]))
    values = {"tuned": interval(tuned, means["tuned"])}
    base = difference = None
    if "base" in whose:
        base = float(np.mean([result.base for result in results if result.base is not None]))
        values["base"] = interval(base, means["base"])
        difference = interval(tuned - base, means["tuned"] - means["base"])
    result = MetricResult(
        dataset=MACRO,
        metric=metrics.pop() if len(metrics) == 1 else "primary",
        rows=sum(result.rows for result in results),
        primary=True,
        base=base,
        tuned=tuned,
        difference=difference,
    )
    return MetricComparison(result, values, {"base": difference} if difference is not None else {})


# -- what a reader looks at -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelLine:
    """One label of a classification."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float
    base_f1: float | None


def label_table(dataset: DatasetAnswers, labels: Sequence[str]) -> list[LabelLine]:
    """Precision, recall and F1 of each label, by scikit-learn."""
    from sklearn.metrics import precision_recall_fscore_support

    def scores(answers: Sequence[Answer]) -> tuple[Float64, ...]:
        found: tuple[Float64, ...] = precision_recall_fscore_support(
            [row.gold for row in dataset.rows],
            [answer.choice for answer in answers],
            labels=list(range(len(labels))),
            zero_division=0,
        )
        return found

    precision, recall, f1, support = scores(dataset.tuned)
    base = scores(dataset.base)[2] if dataset.base is not None else None
    return [
        LabelLine(
            label,
            int(support[i]),
            float(precision[i]),
            float(recall[i]),
            float(f1[i]),
            float(base[i]) if base is not None else None,
        )
        for i, label in enumerate(labels)
    ]


def confusion(rows: Sequence[EvaluationRow], answers: Sequence[Answer], labels: int) -> npt.NDArray[np.int64]:
    """int64[gold, predicted], by scikit-learn."""
    from sklearn.metrics import confusion_matrix

    matrix: npt.NDArray[np.int64] = confusion_matrix(
        [row.gold for row in rows], [answer.choice for answer in answers], labels=list(range(labels))
    )
    return matrix


@dataclass(frozen=True)
class ScoreChange:
    """A row on which base and tuned model differ in score."""

    row: EvaluationRow
    base: Answer
    tuned: Answer
    gain: float
    """The row's own score, tuned minus base."""


def score_changes(dataset: DatasetAnswers) -> tuple[list[ScoreChange], list[ScoreChange]]:
    """Rows that became better and rows that became worse, the largest changes first, else in their order."""
    if dataset.base is None:
        return [], []
    name = dataset.task.traits.primary_metric
    all_ = [
        ScoreChange(row, base, tuned, row_score(name, row, tuned) - row_score(name, row, base))
        for row, base, tuned in zip(dataset.rows, dataset.base, dataset.tuned, strict=True)
    ]
    fixed = sorted((c for c in all_ if c.gain > 0), key=lambda c: -c.gain)
    broken = sorted((c for c in all_ if c.gain < 0), key=lambda c: c.gain)
    return fixed, broken
