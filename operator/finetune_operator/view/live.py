"""The live view: one job on one screen, 80 columns wide or more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from finetune_api.base import STAGES, Stage
from finetune_api.report import Plan
from finetune_api.status import STAGE_CONDITION, ConditionType
from finetune_operator.view.results import render_end
from finetune_operator.view.scene import Scene
from finetune_operator.view.words import amount, count, duration, measure, printable, rate, size, sparkline

SHOWN_FAILURES = 3
TITLE_DATA_WIDTH = 24
SHOWN_WARNINGS = 4


def render(scene: Scene) -> RenderableType:
    """The whole view."""
    parts: list[RenderableType] = [title(scene), stages(scene)]
    if scene.status.is_true(ConditionType.COMPLETE) or scene.status.is_true(ConditionType.FAILED):
        parts += [_rows(_history_rows(scene)), *render_end(scene)]
    else:
        bar = progress_bar(scene)
        parts += [bar] if bar is not None else []
        parts.append(_rows([*_running_rows(scene), *_history_rows(scene)]))
    return Printable(Padding(Group(*parts), (0, 1)))


@dataclass(frozen=True)
class Printable:
    """The same without control characters in its texts: rich leaves some, and a status may hold anything."""

    shown: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.shown, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def title(scene: Scene) -> Text:
    """`support-llama  Meta-Llama-3-8B-Instruct · qlora · claims, banking77`."""
    spec = scene.spec
    model = (spec.model.repo or spec.model.path or "").rstrip("/").rpartition("/")[2]
    names = [dataset.name for dataset in spec.datasets]
    data = ", ".join(names)
    data = data if len(data) <= TITLE_DATA_WIDTH else f"{len(names)} datasets"
    line = Text(f"{scene.name}  ", style="bold", no_wrap=True, overflow="ellipsis")
    return line.append(f"{model} · {spec.tuning.method} · {data}", style="not bold dim")


# Stages -----------------------------------------------------------------------------------------------


def stages(scene: Scene) -> Text:
    """`✓ prepare 42 s   ● train 3:10 min   ○ evaluate   ○ publish`."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for stage in STAGES:
        mark, style = _mark(scene, stage)
        line.append(f"{mark} {stage}", style=style)
        seconds = scene.seconds(stage)
        line.append(f" {duration(seconds)}" if seconds is not None else "", style="dim")
        line.append("   ")
    line.rstrip()
    return line


def _mark(scene: Scene, stage: Stage) -> tuple[str, str]:
    status = scene.status
    if status.is_true(STAGE_CONDITION[stage]):
        refused = stage is Stage.EVALUATE and status.results is not None and not status.results.gate.passed
        return ("✗", "bold red") if refused else ("✓", "green")
    if stage is Stage.PUBLISH and scene.spec.publish is None:
        return "–", "dim"
    if stage is not status.stage:
        return "○", "dim"
    if status.is_true(ConditionType.FAILED):
        return "✗", "bold red"
    if status.is_true(ConditionType.SUSPENDED):
        return "‖", "yellow"
    return ("↻", "bold yellow") if status.retry_at is not None else ("●", "bold cyan")


def progress_bar(scene: Scene) -> RenderableType | None:
    """Bar, steps, share and time to go; None while nothing can be counted."""
    progress = scene.status.progress
    if progress is None or progress.total <= 0:
        return None
    words = Text(amount(progress.step, progress.total, progress.unit), no_wrap=True)
    words.append(f"  {100 * progress.step // progress.total}%", style="bold")
    if progress.eta_seconds is not None:
        words.append(f"  {duration(progress.eta_seconds)} to go", style="dim")
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_row(ProgressBar(total=progress.total, completed=progress.step, complete_style="cyan"), words)
    return grid


# Rows -------------------------------------------------------------------------------------------------


def _rows(rows: list[tuple[str, RenderableType]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(style="dim", no_wrap=True, min_width=10)
    grid.add_column(ratio=1)
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _running_rows(scene: Scene) -> list[tuple[str, RenderableType]]:
    status = scene.status
    rows: list[tuple[str, RenderableType]] = [("now", _now(scene))]
    if status.stage is Stage.TRAIN:
        rows += _training_rows(scene)
        rows += [("plan", Text(_plan(status.plan), style="dim"))] if status.plan is not None else []
    if status.last_checkpoint is not None and status.export is None:
        age = (scene.now - status.last_checkpoint.time).total_seconds()
        rows.append(("checkpoint", Text(f"step {status.last_checkpoint.step:,}, {duration(age)} ago")))
    if status.wandb_url:
        rows.append(("wandb", Text(status.wandb_url, overflow="fold")))
    return rows


def _plan(plan: Plan) -> str:
    parts = [
        f"{plan.steps:,} steps",
        f"{count(plan.trainable_parameters)} of {count(plan.parameters)} parameters trained",
    ]
    if plan.memory_bytes:
        device = f" of {size(plan.device_bytes)}" if plan.device_bytes else ""
        parts.append(f"{size(plan.memory_bytes)}{device} per rank")
    return " · ".join(parts)


def _now(scene: Scene) -> Text:
    status = scene.status
    state = status.condition(ConditionType.RECONCILING)
    quiet = state is None or state.status != "True" or state.reason in ("Starting", *_STAGE_REASONS)
    if status.is_true(ConditionType.SUSPENDED):
        return Text("stopped", style="yellow")
    if quiet or state is None:
        return Text(status.activity or "starting")
    wait = f" (in {duration((status.retry_at - scene.now).total_seconds())})" if status.retry_at else ""
    return Text(state.message + wait, style="yellow")


_STAGE_REASONS = ("Preparing", "Training", "Evaluating", "Publishing", "Ending")


def _training_rows(scene: Scene) -> Iterator[tuple[str, RenderableType]]:
    progress, history = scene.status.progress, scene.history
    losses = [history.loss[step] for step in sorted(history.loss)]
    newest = losses[-1] if losses else (progress.loss if progress else None)
    if newest is not None:
        line = Text(f"{newest:.4f}  ", no_wrap=True)
        yield "loss", line.append(sparkline(losses, 40), style="cyan")
    if progress is not None and (progress.tokens_per_second or progress.learning_rate is not None):
        speed = f"{count(progress.tokens_per_second)} tokens/s" if progress.tokens_per_second else ""
        if progress.computed_tokens_per_second:
            speed += f" ({count(progress.computed_tokens_per_second)} computed)"
        learning = f"learning rate {rate(progress.learning_rate)}" if progress.learning_rate is not None else ""
        epoch = f"epoch {progress.epoch:.2f}" if progress.epoch is not None else ""
        yield "speed", Text(" · ".join(part for part in (speed, learning, epoch) if part), no_wrap=True)
    if (validation := _validation(scene)) is not None:
        yield "validation", validation


def _validation(scene: Scene) -> Text | None:
    curves = scene.history.validation
    if curves:
        step = max(curves)
        values = "  ".join(f"{name} {measure(value)}" for name, value in curves[step].items())
        names = "accuracy" if any("accuracy" in row for row in curves.values()) else "loss"
        curve = [row[names] for _, row in sorted(curves.items()) if names in row]
        line = Text(f"{values}  (step {step:,})  ", no_wrap=True)
        return line.append(sparkline(curve, 20), style="magenta")
    shown = scene.status.progress.validation if scene.status.progress else None
    return Text(f"{shown.metric} {measure(shown.value)}") if shown is not None else None


def _history_rows(scene: Scene) -> list[tuple[str, RenderableType]]:
    status = scene.status
    rows: list[tuple[str, RenderableType]] = []
    running = status.stage
    ended = [record for record in status.attempts if record.outcome == "failed"]
    if status.is_true(ConditionType.FAILED):
        ended = ended[:-1]  # the verdict says it in full
    for record in ended[-SHOWN_FAILURES:]:
        counted = "" if record.counted else ", not counted"
        text = f"{record.stage} attempt {record.number}: {record.message} ({record.reason}{counted})"
        rows.append(("failed", Text(text, style="red")))
    current = next((r for r in reversed(status.attempts) if r.outcome == "running" and r.stage is running), None)
    if current is not None and current.number > 1:
        resumed = current.resumed_from_step
        since = f", resumed from step {resumed:,}" if resumed is not None else ""
        rows.append(("attempt", Text(f"{current.number}{since}")))
    if status.choices:
        chosen = " · ".join(f"{name} {choice.value}" for name, choice in status.choices.items())
        rows.append(("chosen", Text(chosen, style="dim")))
    rows += [("warning", Text(sentence, style="yellow")) for sentence in status.warnings[-SHOWN_WARNINGS:]]
    if len(status.warnings) > SHOWN_WARNINGS:
        rows.append(("", Text(f"and {len(status.warnings) - SHOWN_WARNINGS} more warnings", style="dim")))
    rows += [("note", Text(sentence, style="yellow")) for sentence in scene.notes[-SHOWN_WARNINGS:]]
    return rows
