"""The gate: whether what was measured is enough to publish. Pure; told in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.report import GateOutcome, Interval, MetricResult
from finetune_api.spec import Gate

MACRO = "macro"
LEAST_ROWS = 30
"""Fewer rows than this in any dataset: bootstrap intervals are too narrow to be believed, so nothing is decided."""


def decide_gate(gate: Gate, metrics: Sequence[MetricResult], *, baseline: bool) -> GateOutcome:
    """Passed or not, the reason, and the sentence.

    `mustImprove`: the macro-mean's lower bound is above 0 and no dataset's upper bound is below 0. Without a
    baseline only the minimum metrics are asked.
    """
    below = _below_minimum(gate, metrics)
    if below:
        return GateOutcome(passed=False, reason="below-minimum", sentence=" ".join(below))
    minimum_met = f"All {len(gate.minimum)} minimum metrics are met. " if gate.minimum else ""
    if not gate.must_improve:
        return GateOutcome(
            passed=True,
            reason="not-asked",
            sentence=f"{minimum_met}No improvement was asked for (evaluation.gate.mustImprove: false).",
        )
    if not baseline:
        return GateOutcome(
            passed=True,
            reason="not-asked",
            sentence=f"{minimum_met}Nothing to compare with: the base model was not measured "
            "(evaluation.baseline: false), so only minimum metrics count.",
        )
    return _must_improve(metrics, minimum_met)


def _must_improve(metrics: Sequence[MetricResult], minimum_met: str) -> GateOutcome:
    primary = [m for m in metrics if m.primary and m.dataset != MACRO]
    few = [m for m in primary if m.rows < LEAST_ROWS]
    if few or not primary:
        named = ", ".join(f"{m.dataset} ({m.rows})" for m in few) or "every dataset (0)"
        return GateOutcome(
            passed=False,
            reason="undecided",
            sentence=f"Undecided: too few held-out rows in {named}; at least {LEAST_ROWS} a dataset are needed to tell "
            "whether the model is better. Hold out more rows (split.test or split.validation) or raise "
            "evaluation.maxRows.",
        )
    worse = [m for m in primary if m.difference is not None and m.difference.high < 0]
    if worse:
        return GateOutcome(passed=False, reason="worse", sentence=f"Worse than the base model: {_differences(worse)}.")
    overall = primary[0] if len(primary) == 1 else next(m for m in metrics if m.dataset == MACRO)
    if overall.difference is None or overall.difference.low <= 0:
        return GateOutcome(
            passed=False,
            reason="not-significant",
            sentence=f"Not significant: {_differences([overall])}; the interval must lie above 0.",
        )
    return GateOutcome(
        passed=True,
        reason="improved",
        sentence=f"{minimum_met}Better than the base model: {_differences([overall])}"
        f"{', and no dataset is worse' if len(primary) > 1 else ''}.",
    )


def _below_minimum(gate: Gate, metrics: Sequence[MetricResult]) -> list[str]:
    measured = {f"{m.dataset}/{m.metric}": m.tuned for m in metrics}
    sentences = []
    for name, least in gate.minimum.items():
        if name not in measured:
            sentences.append(f"{name} of evaluation.gate.minimum was not measured; there are {', '.join(measured)}.")
        elif not measured[name] >= least:
            sentences.append(f"{name} is {measured[name]:.4g}, below the minimum of {least:.4g}.")
    return sentences


def _differences(metrics: Sequence[MetricResult]) -> str:
    return "; ".join(f"{_named(m)} {spoken(m.difference)}" for m in metrics if m.difference is not None)


def _named(metric: MetricResult) -> str:
    return f"{'the mean over datasets' if metric.dataset == MACRO else f'{metric.dataset}/{metric.metric}'} changed by"


def spoken(interval: Interval) -> str:
    """`+0.120 (95% interval +0.051 to +0.189)`."""
    return f"{interval.value:+.3f} (95% interval {interval.low:+.3f} to {interval.high:+.3f})"
