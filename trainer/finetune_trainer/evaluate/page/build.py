"""From results to the page: sentences, tables and charts as plain values, then one template.

Prompts, labels and answers are a stranger's data: everything goes through autoescape, and the page's own policy
forbids scripts and requests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from finetune_api.base import Stage
from finetune_api.report import Plan, Report, Results
from finetune_api.runconfig import RunConfig, reproduced
from finetune_api.structure import leaves
from finetune_api.traits import Scoring, Task
from finetune_trainer.data.manifest import PreparedDataset, PreparedManifest
from finetune_trainer.evaluate.baselines import WORDS
from finetune_trainer.evaluate.bootstrap import STATEMENT
from finetune_trainer.evaluate.compare import (
    DatasetAnswers,
    LabelLine,
    MetricComparison,
    ScoreChange,
    confusion,
    label_table,
    score_changes,
)
from finetune_trainer.evaluate.gate import MACRO
from finetune_trainer.evaluate.metrics import LOWER_IS_BETTER, PERCENT
from finetune_trainer.evaluate.page.charts import Level, Series, heatmap, level_chart, line_chart, minus
from finetune_trainer.reports import newest_done

HERE = Path(__file__).parent
EXAMPLES_SHOWN = 8
CONFUSIONS_SHOWN = 12
MOST_LABELS_IN_A_MATRIX = 100
LONGEST_TEXT = 700

BADGES: dict[str, tuple[str, str]] = {
    "improved": ("good", "Better than the base model"),
    "not-significant": ("wait", "Not significant"),
    "worse": ("bad", "Worse than the base model"),
    "below-minimum": ("bad", "Below the minimum"),
    "undecided": ("wait", "Undecided: too few rows"),
    "not-asked": ("wait", "Evaluated, no improvement required"),
    "not-measured": ("wait", "Nothing was measured"),
}


@dataclass(frozen=True)
class PromptAnswers:
    """A free prompt with the answers of both models."""

    prompt: str
    base: str | None
    tuned: str


@dataclass(frozen=True)
class ReportData:
    """What the page is made from."""

    config: RunConfig
    manifest: PreparedManifest
    results: Results
    answered: Sequence[DatasetAnswers]
    compared: Sequence[MetricComparison]
    prompted: Sequence[PromptAnswers]
    reports: Sequence[tuple[int, Report]]
    metrics: Sequence[dict[str, Any]]
    origin: dict[str, Any]
    created: datetime


def write_page(path: Path, data: ReportData) -> None:
    """Write the page so that a reader sees the old or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(page_html(data), encoding="utf-8")
    aside.replace(path)


def page_html(data: ReportData) -> str:
    """The whole page."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"value": value, "change": change}
    template = environment.get_template("page.html.j2")
    # The style sheet is ours; everything else is escaped.
    return template.render(css=Markup((HERE / "page.css").read_text()), **_view(data))


def _view(data: ReportData) -> dict[str, Any]:
    spec, results = data.config.spec, data.results
    kind, word = BADGES[results.gate.reason]
    train = newest_done(list(data.reports), Stage.TRAIN)
    prepare = newest_done(list(data.reports), Stage.PREPARE)
    return {
        "job": data.config.job.name,
        "created": data.created.strftime("%d %B %Y, %H:%M UTC"),
        "model": data.manifest.model.source,
        "method": spec.tuning.method.traits.title,
        "dataset_names": _and([dataset.name for dataset in data.manifest.datasets]),
        "rows": f"{sum(len(dataset.rows) for dataset in data.answered):,}",
        "split": results.split,
        "badge": {"kind": kind, "word": word},
        "sentence": results.gate.sentence.removeprefix(f"{word}: "),
        "headline": headline(data.compared),
        "main": _main(data.compared),
        "charts": [_level_view(one) for one in data.compared if one.result.primary and one.result.dataset != MACRO],
        "lines": [_line(one, _all_percent(data.compared)) for one in _without_lone_macro(data.compared)],
        "statement": STATEMENT,
        "precision": data.origin.get("precision", "") + (", 4-bit base" if data.origin.get("quantized") else ""),
        "scoring": _scoring({dataset.task.traits.scoring for dataset in data.answered}),
        "curves": curves(data.metrics),
        "training_facts": _training_facts(train, data.metrics),
        "prompted": data.prompted,
        "datasets": [_dataset_view(dataset, data.manifest.dataset(dataset.name)) for dataset in data.answered],
        "warnings": list(dict.fromkeys(sentence for _, report in data.reports for sentence in report.warnings)),
        "data_facts": prepare.datasets if prepare else [],
        "plan": _plan_lines(prepare.plan) if prepare and prepare.plan else [],
        "choices": sorted({name: c for _, report in data.reports for name, c in report.choices.items()}.items()),
        "attempts": [
            _attempt_line(number, report) for number, report in data.reports if report.stage != Stage.EVALUATE
        ],
        "origin": [(name, str(value)) for name, value in leaves(data.origin) if value not in (None, "", [])],
        "spec": yaml.safe_dump(reproduced(spec), sort_keys=False, allow_unicode=True, width=100),
    }


# -- words ------------------------------------------------------------------------------------------------------


def value(number: float, percent: bool) -> str:
    """`61.2%`, `1.834` or `12,310`."""
    if percent:
        return f"{100 * number:.1f}%"
    return minus(f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}")


def change(number: float, percent: bool) -> str:
    """`+4.1` (points) for percentages, else `+0.21` or `-12,310`."""
    if percent:
        return minus(f"{100 * number:+.1f}")
    return minus(f"{number:+,.0f}" if abs(number) >= 1000 else f"{number:+.3g}")


def headline(compared: Sequence[MetricComparison]) -> list[str]:
    """Baselines that the tuned model does not beat: they belong beside the verdict."""
    sentences = []
    for one in compared:
        if not one.result.primary or one.result.dataset == MACRO:
            continue
        for who, advantage in one.advantage.items():
            if who == "base" or advantage.low > 0:
                continue
            percent = one.result.metric in PERCENT
            verdict = "better than the tuned model" if advantage.high < 0 else "not significantly different"
            sentences.append(
                f"{one.result.dataset}: {_lower(WORDS.get(who, who))} reaches "
                f"{value(one.values[who].value, percent)}, {verdict} ({value(one.result.tuned, percent)})."
            )
    return sentences


def _level_view(one: MetricComparison) -> dict[str, Any]:
    percent = one.result.metric in PERCENT
    levels = [Level("tuned model", one.values["tuned"], "tuned")]
    levels += [Level("base model", one.values["base"], "base")] if "base" in one.values else []
    levels += [Level(SHORT.get(who, who), v) for who, v in one.values.items() if who not in ("tuned", "base")]
    sentences = [
        f"{WORDS[who]}: {value(one.values[who].value, percent)}. Tuned minus this: "
        f"{change(advantage.value, percent)}{' points' if percent else ''} ({change(advantage.low, percent)} to "
        f"{change(advantage.high, percent)}{', not significant' if advantage.low <= 0 <= advantage.high else ''})."
        for who, advantage in one.advantage.items()
        if who in WORDS
    ]
    return {
        "title": f"{one.result.dataset}: {one.result.metric}",
        "rows": f"{one.result.rows:,}",
        "svg": level_chart(levels, percent=percent),
        "sentences": sentences,
    }


SHORT = {
    "majority": "majority label",
    "tfidf-logreg": "TF-IDF, same rows",
    "tfidf-logreg-all": "TF-IDF, all rows",
    "few-shot": "base, with examples",
}


def _main(compared: Sequence[MetricComparison]) -> dict[str, Any] | None:
    """The figure at the top: the mean over datasets, or the one dataset's primary metric."""
    primary = [one for one in compared if one.result.primary]
    if not primary:
        return None
    lone, percent = len(primary) == 2, _all_percent(compared)
    view = _line(primary[0] if lone else primary[-1], percent)
    units = {one.result.metric in PERCENT for one in primary[:-1]}
    # A mean of accuracies and losses is good for a difference, not for a level.
    return view | {"levels": len(units) == 1}


def _all_percent(compared: Sequence[MetricComparison]) -> bool:
    """Whether the mean over datasets is one of percentages."""
    return all(one.result.metric in PERCENT for one in compared if one.result.primary and one.result.dataset != MACRO)


def _line(one: MetricComparison, macro_percent: bool) -> dict[str, Any]:
    several = one.result.dataset == MACRO
    metric = "primary metrics" if one.result.metric == "primary" else one.result.metric
    return {
        "result": one.result,
        "base": one.values.get("base"),
        "tuned": one.values["tuned"],
        "percent": macro_percent if several else one.result.metric in PERCENT,
        "lower_is_better": one.result.metric in LOWER_IS_BETTER,
        "name": f"{metric}, mean over datasets" if several else f"{one.result.dataset}: {metric}",
    }


def _without_lone_macro(compared: Sequence[MetricComparison]) -> Sequence[MetricComparison]:
    """The mean over one dataset says nothing new."""
    lone = sum(one.result.primary for one in compared) == 2
    return [one for one in compared if not (lone and one.result.dataset == MACRO)]


def _scoring(scorings: set[Scoring]) -> str:
    sentences = []
    if Scoring.CANDIDATES in scorings:
        sentences.append(
            "For classification and multiple choice, the answer is the candidate with the highest total "
            "log-probability, end token included."
        )
    if Scoring.GENERATION in scorings:
        sentences.append(
            "For question answering and summarisation, answers are generated by greedy decoding; thoughts and what "
            "the chat template writes around an answer are not scored."
        )
    if Scoring.LIKELIHOOD in scorings:
        sentences.append("For chat and text, neg-loss is minus the mean loss per token, in nats.")
    return " ".join(sentences)


# -- training ---------------------------------------------------------------------------------------------------


def curves(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss, validation, learning rate and gradient norm over the steps, as far as they were logged."""
    steps = [row for row in metrics if "loss" in row]
    losses = _points(steps, "loss")
    loss = [Series("training, every step", losses, "muted"), Series("training, smoothed", smoothed(losses), "tuned")]
    validated = [
        (row["step"], row["validation"]["loss"])
        for row in metrics
        if isinstance(row.get("validation"), dict) and isinstance(row["validation"].get("loss"), int | float)
    ]
    loss += [Series("validation", validated, "base", dots=True)] if validated else []
    accuracy = [
        (row["step"], row["validation"]["accuracy"])
        for row in metrics
        if isinstance(row.get("validation"), dict) and isinstance(row["validation"].get("accuracy"), int | float)
    ]
    drawn = [
        ("Loss", loss, "loss"),
        ("Validation accuracy, teacher-forced", [Series("validation", accuracy, "base", dots=True)], "accuracy"),
        ("Learning rate", [Series("learning rate", _points(steps, "learningRate"))], "learning rate"),
        ("Gradient norm", [Series("before clipping", _points(steps, "gradNorm"))], "gradient norm"),
        ("Speed", [Series("tokens per second", _points(steps, "tokensPerSecond"))], "tokens/s"),
    ]
    views = []
    for title, series, y in drawn:
        svg = line_chart(series, x="step", y=y, from_zero=y not in ("loss", "accuracy"))
        if svg:
            views.append({"title": title, "series": [s for s in series if s.points], "svg": svg})
    return views


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name] if isinstance(row.get(name), int | float) else math.nan) for row in rows]


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.06) -> list[tuple[float, float]]:
    """Mean over a centred window of `share` of the points; values that are not finite are passed over."""
    half = max(1, round(len(points) * share / 2))
    result = []
    for index, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, index - half) : index + half + 1] if math.isfinite(y)]
        result.append((x, float(np.mean(window)) if window else math.nan))
    return result


def _training_facts(train: Report | None, metrics: Sequence[dict[str, Any]]) -> str:
    steps = [row for row in metrics if "loss" in row]
    if not steps:
        return ""
    tokens = sum(row.get("tokens") or 0 for row in steps)
    exported = f"; the weights of step {train.export.step:,} were exported" if train and train.export else ""
    return f"{len(steps):,} steps, {tokens:,} tokens{exported}."


# -- one dataset ------------------------------------------------------------------------------------------------


def _dataset_view(dataset: DatasetAnswers, prepared: PreparedDataset) -> dict[str, Any]:
    fixed, broken = score_changes(dataset)
    view: dict[str, Any] = {
        "name": dataset.name,
        "task": dataset.task.value,
        "exact": dataset.task.traits.primary_metric == "accuracy",
        "with_base": dataset.base is not None,
        "fixed": [_change(c, dataset.task) for c in fixed[:EXAMPLES_SHOWN]],
        "fixed_total": len(fixed),
        "broken": [_change(c, dataset.task) for c in broken[:EXAMPLES_SHOWN]],
        "broken_total": len(broken),
        "confusion": [],
        "confused": [],
        "labels": [],
    }
    if not dataset.task.traits.has_labels:
        return view
    labels = dataset.rows[0].candidates or prepared.labels
    matrix = confusion(dataset.rows, dataset.tuned, len(labels))
    if len(labels) <= MOST_LABELS_IN_A_MATRIX:
        view["confusion"] = [{"title": "Tuned model", "svg": heatmap(matrix, labels)}]
        if dataset.base is not None:
            of_base = confusion(dataset.rows, dataset.base, len(labels))
            view["confusion"].append({"title": "Base model", "svg": heatmap(of_base, labels)})
    pairs = [
        (int(matrix[g, s]), g, s) for g in range(len(labels)) for s in range(len(labels)) if g != s and matrix[g, s]
    ]
    most = sorted(pairs, key=lambda p: (-p[0], p[1], p[2]))[:CONFUSIONS_SHOWN] if len(labels) > 4 else []
    view["confused"] = [{"gold": labels[g], "said": labels[s], "rows": count} for count, g, s in most]
    lines: list[LabelLine] = label_table(dataset, labels)
    view["labels"] = sorted(lines, key=lambda line: (line.f1, line.label)) if len(lines) > 12 else lines
    return view


def _change(change_: ScoreChange, task: Task) -> dict[str, str]:
    row = change_.row
    if task.traits.scoring is Scoring.LIKELIHOOD:
        gold, said = "–", [f"loss {a.nll / max(1, a.tokens):.3f}" for a in (change_.base, change_.tuned)]
    else:
        gold = row.candidates[row.gold or 0] if row.candidates else " | ".join(row.answers)
        said = [change_.base.text or "(empty)", change_.tuned.text or "(empty)"]
    question = row.text or row.prompt or row.id
    return {"question": _cut(question), "gold": _cut(gold), "base": _cut(said[0]), "tuned": _cut(said[1])}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


# -- origin -----------------------------------------------------------------------------------------------------


def _plan_lines(plan: Plan) -> list[tuple[str, str]]:
    lines = [
        ("Ranks", f"{plan.world_size:,}"),
        ("Optimiser steps", f"{plan.steps:,}"),
        ("Training examples per epoch", f"{plan.examples:,}"),
        ("Training tokens", f"{plan.tokens:,}"),
        ("Trained parameters", f"{plan.trainable_parameters:,} of {plan.parameters:,}"),
        ("Tokens per packed sequence", f"{plan.micro_batch_tokens:,}"),
    ]
    lines += [(f"Memory per rank: {part.name}", size(part.bytes)) for part in plan.memory]
    return [*lines, ("Memory per rank, total", size(plan.memory_bytes))] if plan.memory_bytes else lines


def size(count: int) -> str:
    """Bytes in words: `1.5 GiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _attempt_line(number: int, report: Report) -> dict[str, Any]:
    if report.failure is not None:
        end = f"{report.failure.failure_class}: {report.failure.sentence}"
    else:
        end = "done" if report.done else f"not finished ({report.activity or 'no activity reported'})"
    if report.resumed_from_step is not None:
        end = f"resumed from step {report.resumed_from_step:,}; {end}"
    return {"stage": report.stage.value, "number": number, "end": end}


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _lower(words: str) -> str:
    return words if words.startswith("TF-IDF") else words[:1].lower() + words[1:]
