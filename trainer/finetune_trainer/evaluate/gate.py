"""The gate: whether what was measured is enough to publish. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.holdout import LEAST_ROWS, too_few
from finetune_api.report import GateOutcome, Interval, MetricResult
from finetune_api.spec import Gate
from finetune_trainer.evaluate.metrics import PERCENT

MACRO = "macro"


def decide_gate(gate: Gate, metrics: Sequence[MetricResult], *, baseline: bool) -> GateOutcome:
    """Passed or not, the reason, and the sentence.

    `mustImprove`: the macro-mean's lower bound is above 0 and no dataset's upper bound is below 0. Without a
    baseline only the minimum metrics are asked.
    """
    if not metrics and not gate.must_improve and not gate.minimum:
        return GateOutcome(
            passed=True,
            reason="not-measured",
            sentence="Nothing was measured, because no rows are held out, and no improvement is required "
            "(evaluation.gate.mustImprove: false).",
        )
    below = _below_minimum(gate, metrics)
    if below:
        return GateOutcome(passed=False, reason="below-minimum", sentence=" ".join(below))
    minimum_met = f"All {len(gate.minimum)} minimum metrics are met. " if gate.minimum else ""
    if not gate.must_improve:
        return GateOutcome(
            passed=True,
            reason="not-asked",
            sentence=f"{minimum_met}No improvement is required (evaluation.gate.mustImprove: false).",
        )
    if not baseline:
        return GateOutcome(
            passed=True,
            reason="not-asked",
            sentence=f"{minimum_met}The base model was not evaluated "
            "(evaluation.baseline: false), so only minimum metrics count.",
        )
    return _must_improve(metrics, minimum_met)


def _must_improve(metrics: Sequence[MetricResult], minimum_met: str) -> GateOutcome:
    primary = [m for m in metrics if m.primary and m.dataset != MACRO]
    few = too_few({m.dataset: m.rows for m in primary})
    if few or not primary:
        named = ", ".join(f"{name} ({rows})" for name, rows in few.items()) or "every dataset (0)"
        return GateOutcome(
            passed=False,
            reason="undecided",
            sentence=f"Undecided: too few held-out rows in {named}; each dataset needs at least {LEAST_ROWS}. Hold out "
            "more rows (split.test or split.validation) or, if it is set, raise evaluation.maxRows.",
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
            sentences.append(f"{name} of evaluation.gate.minimum was not measured. Available: {', '.join(measured)}.")
        elif not measured[name] >= least:
            sentences.append(f"{name} is {measured[name]:.4g}, below the minimum of {least:.4g}.")
    return sentences


def _differences(metrics: Sequence[MetricResult]) -> str:
    return "; ".join(_difference(m, m.difference) for m in metrics if m.difference is not None)


def _difference(metric: MetricResult, change: Interval) -> str:
    """`tweets accuracy improved by 28.1 points (95% interval +22.0 to +34.1)`."""
    name = "the mean over datasets" if metric.dataset == MACRO else f"{metric.dataset} {metric.metric}"
    # The mean of several metrics has no unit of its own.
    scale, digits, unit = (100, 1, " points") if metric.metric in PERCENT else (1, 3, "")
    value, low, high = (scale * number for number in (change.value, change.low, change.high))
    verb = "dropped" if value < 0 else "improved"
    return f"{name} {verb} by {abs(value):.{digits}f}{unit} (95% interval {low:+.{digits}f} to {high:+.{digits}f})"
