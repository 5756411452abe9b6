"""How a job ended: the table of base and tuned, the gate's sentence, and the paths of all results."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from finetune_api.report import Interval, MetricResult, Results
from finetune_api.status import ConditionType
from finetune_operator.view.scene import Scene
from finetune_operator.view.words import measure

BASELINE_NAMES = {"tfidf-logreg": "TF-IDF", "tfidf-logreg-all": "TF-IDF fitted on all rows"}
MEAN_OF_DATASETS = "macro"
COLUMN_BASELINES = ("majority", "tfidf-logreg")


def render_end(scene: Scene) -> list[RenderableType]:
    """Results, verdict and paths of a job that is complete or has failed."""
    status = scene.status
    parts: list[RenderableType] = []
    if status.results is not None:
        parts += ["", results_table(status.results), *further_baselines(status.results), ""]
        style = "green" if status.results.gate.passed else "red"
        parts.append(Text(status.results.gate.sentence, style=style))
    failed = status.condition(ConditionType.FAILED)
    if failed is not None and failed.status == "True" and failed.reason != "GateRefused":
        parts += ["", Text(failed.message, style="bold red")]
    parts += ["", *paths(scene)]
    return parts


def results_table(results: Results) -> Table:
    """One line per dataset and metric: before, after, difference with its interval, simple baselines."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, padding=(0, 1), show_edge=False)
    shown = [name for name in COLUMN_BASELINES if any(name in metric.baselines for metric in results.metrics)]
    several = len({metric.dataset for metric in results.metrics} - {MEAN_OF_DATASETS}) > 1
    table.add_column("dataset", overflow="ellipsis", no_wrap=True, max_width=16)
    table.add_column("metric", no_wrap=True)
    for name in ("rows", "base", "tuned"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tuned − base", no_wrap=True)
    for name in shown:
        table.add_column(BASELINE_NAMES.get(name, name), justify="right", no_wrap=True)
    for metric in results.metrics:
        if metric.dataset == MEAN_OF_DATASETS:
            if not several:
                continue
            table.add_section()
        table.add_row(*_cells(metric, shown), style="" if metric.primary else "dim")
    return table


def _cells(metric: MetricResult, shown: list[str]) -> list[RenderableType]:
    return [
        metric.dataset,
        metric.metric,
        f"{metric.rows:,}",
        measure(metric.base),
        Text(measure(metric.tuned), style="bold" if metric.primary else ""),
        difference(metric.difference),
        *(measure(metric.baselines.get(name)) if name in metric.baselines else "" for name in shown),
    ]


def difference(interval: Interval | None) -> Text:
    """`+0.208` above `[+0.141, +0.272]`, green or red if significant; otherwise marked as not."""
    if interval is None:
        return Text("–")
    style = "green" if interval.low > 0 else "red" if interval.high < 0 else "yellow"
    words = Text(measure(interval.value, signed=True), style=style)
    words.append(f"\n[{measure(interval.low, True)}, {measure(interval.high, True)}]", style="dim")
    if interval.low <= 0 <= interval.high:
        words.append("\nnot significant", style="yellow")
    return words


def further_baselines(results: Results) -> list[RenderableType]:
    """Lines for the baselines that have no column."""
    lines: list[RenderableType] = []
    for metric in results.metrics:
        rest = {name: value for name, value in metric.baselines.items() if name not in COLUMN_BASELINES}
        if rest:
            words = ", ".join(f"{BASELINE_NAMES.get(name, name)} {measure(value)}" for name, value in rest.items())
            lines.append(Text(f"{metric.dataset} {metric.metric}: {words}", style="dim"))
    return lines


def paths(scene: Scene) -> list[RenderableType]:
    """Where model, report and publication are."""
    status = scene.status
    places: list[tuple[str, str]] = []
    if status.export is not None:
        places.append(("model", _below(scene.run, status.export.path)))
    if status.results is not None and status.results.report:
        places.append(("report", _below(scene.run, status.results.report)))
    if status.published is not None:
        places.append(("published", status.published.url or status.published.repo or status.published.path or ""))
    if scene.run:
        places.append(("run", _short(scene.run)))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=10)
    grid.add_column(overflow="fold")
    for name, where in places:
        grid.add_row(name, where)
    return [grid]


def _below(run: str, path: str) -> str:
    return _short(str(Path(run) / path)) if run else path


def _short(path: str) -> str:
    """Relative to the working directory, if it is below it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
