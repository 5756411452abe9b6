"""Charts as inline SVG. Colours are CSS classes, so that one page is right in light, in dark and on paper. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from finetune_api.report import Interval

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart. `kind` is its CSS class: tuned, base or muted."""

    name: str
    points: Points
    kind: str = "tuned"
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """One value with its interval, on a line of its own."""

    name: str
    value: Interval
    kind: str = "muted"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover `low` to `high`."""
    if not math.isfinite(high - low) or high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def number(value: float) -> str:
    """A value for an axis: `2e-4`, `0.25`, `1,200`."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        short = f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
        return minus(short)
    return minus(f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")


def minus(text: str) -> str:
    """A negative number with the sign that is as wide as a plus."""
    return text.replace("-", "−", 1) if text.startswith("-") else text


WIDTH, HEIGHT = 520.0, 230.0
LARGEST = 1e100
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 12.0, 36.0


def line_chart(series: Sequence[Series], *, x: str, y: str, from_zero: bool = False) -> Markup:
    """Lines over a common x axis. Values that are not finite leave a gap. Empty where there is nothing to draw."""
    finite = [p for s in series for p in s.points if _drawable(p)]
    if not finite:
        return Markup("")
    xs = ticks(min(p[0] for p in finite), max(p[0] for p in finite), 6)
    ys = ticks(0.0 if from_zero else min(p[1] for p in finite), max(p[1] for p in finite))
    frame = _Frame((min(p[0] for p in finite), max(p[0] for p in finite)), (ys[0], ys[-1]))
    parts = [_svg(WIDTH, HEIGHT, f"{y} over {x}"), *_grid(frame, xs, ys)]
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 3, x, "middle", "axis"))
    for one in series:
        parts += _line(one, frame)
    return Markup("").join([*parts, Markup("</svg>")])


def _drawable(point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) and abs(value) < LARGEST for value in point)


@dataclass(frozen=True)
class _Frame:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((value - low) / (high - low) if high > low else 0.5)


def _grid(frame: _Frame, xs: Sequence[float], ys: Sequence[float]) -> list[Markup]:
    parts = []
    for value in ys:
        at = frame.y(value)
        parts.append(_rule(LEFT, at, WIDTH - RIGHT, at, "grid"))
        parts.append(_text(LEFT - 7, at + 3.5, number(value), "end", "tick"))
    for value in xs:
        if frame.x_range[0] <= value <= frame.x_range[1]:
            parts.append(_text(frame.x(value), HEIGHT - BOTTOM + 15, number(value), "middle", "tick"))
    return parts


def _line(series: Series, frame: _Frame) -> list[Markup]:
    commands = []
    pen_up = True
    for px, py in series.points:
        if not _drawable((px, py)):
            pen_up = True
            continue
        commands.append(f"{'M' if pen_up else 'L'}{frame.x(px):.1f} {frame.y(py):.1f}")
        pen_up = False
    parts = [Markup('<path class="line {}" d="{}"/>').format(series.kind, " ".join(commands))]
    if series.dots or len(series.points) == 1:
        dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.2"><title>{}</title></circle>')
        for px, py in series.points:
            if _drawable((px, py)):
                words = f"{series.name} {number(py)} at {number(px)}"
                parts.append(dot.format(series.kind, frame.x(px), frame.y(py), words))
    return parts


ROW = 30.0
NAME = 190.0
VALUES = 184.0


def level_chart(levels: Sequence[Level], *, percent: bool) -> Markup:
    """Values with 95% intervals, one below the other, best read from top to bottom."""
    if not levels:
        return Markup("")
    low = min(level.value.low for level in levels)
    high = max(level.value.high for level in levels)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 0.05
    low, high = low - margin, high + margin
    if percent:
        low, high = max(0.0, low), min(1.0, high)
    marks = [mark for mark in ticks(low, high, 6) if low <= mark <= high]
    width, height = 760.0, ROW * len(levels) + 30

    def at(value: float) -> float:
        return NAME + (width - NAME - VALUES) * (value - low) / ((high - low) or 1.0)

    parts = [_svg(width, height, "values with 95% intervals")]
    for mark in marks:
        parts.append(_rule(at(mark), 4, at(mark), height - 24, "grid"))
        parts.append(
            _text(
                at(mark),
                height - 8,
                _value(mark, percent, 0 if len(marks) < 2 or marks[1] - marks[0] >= 0.01 else 1),
                "middle",
                "tick",
            )
        )
    for index, level in enumerate(levels):
        y = ROW * index + ROW / 2 + 4
        value = level.value
        parts.append(_text(NAME - 14, y + 4.5, level.name, "end", f"name {level.kind}"))
        parts.append(_rule(at(value.low), y, at(value.high), y, f"whisker {level.kind}"))
        parts.append(
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="6"/>').format(level.kind, at(value.value), y)
        )
        ends = f"{_value(value.low, percent)} to {_value(value.high, percent)}"
        parts.append(_text(width - VALUES + 14, y + 4.5, _value(value.value, percent), "start", f"figure {level.kind}"))
        parts.append(_text(width - 2, y + 4.5, ends, "end", "tick"))
    return Markup("").join([*parts, Markup("</svg>")])


def _value(value: float, percent: bool, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if percent else number(float(f"{value:.3g}"))


LABELS_SHOWN = 24
"""More labels than this: cells alone, names on hover."""
LABEL_LENGTH = 24
LETTER_WIDTH = 6.6
"""Of a tick, in the units of the drawing."""


def heatmap(matrix: npt.NDArray[np.int64], labels: Sequence[str]) -> Markup:
    """Confusion matrix: a row a true label, a column a predicted one, shaded by the share of the row."""
    count = len(labels)
    named = count <= LABELS_SHOWN
    cell = max(7.0, min(46.0, 560.0 / max(count, 1)))
    shown = [label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…" for label in labels]
    longest = LETTER_WIDTH * max((len(label) for label in shown), default=0)
    size = cell * count
    slanted = longest > cell
    left = 16 + longest if named else 18.0
    # A slanted name is as high as its length times the sine of its angle.
    bottom = 24 + 0.77 * longest if named and slanted else 30.0
    parts = [_svg(left + size + 8, size + bottom + 8, "confusion matrix", fixed=True)]
    totals = np.maximum(matrix.sum(axis=1), 1)
    square = Markup('<rect class="cell {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}">')
    for gold in range(count):
        for said in range(count):
            share = matrix[gold, said] / totals[gold]
            x, y = left + said * cell, gold * cell
            kind = "hit" if gold == said else "miss"
            parts.append(square.format(kind, x + 0.5, y + 0.5, cell - 1, cell - 1, 0.04 + 0.9 * share))
            words = f"{labels[gold]} → {labels[said]}: {matrix[gold, said]} ({share:.0%})"
            parts.append(Markup("<title>{}</title></rect>").format(words))
            if cell >= 24 and matrix[gold, said]:
                strong = "strong" if share > 0.55 else ""
                parts.append(
                    _text(x + cell / 2, y + cell / 2 + 4, str(matrix[gold, said]), "middle", f"count {strong}")
                )
    if named:
        parts += _heatmap_names(labels, shown, slanted, left, size, cell)
    return Markup("").join([*parts, Markup("</svg>")])


def _heatmap_names(
    labels: Sequence[str], shown: Sequence[str], slanted: bool, left: float, bottom: float, cell: float
) -> list[Markup]:
    """Names of rows to the left of the cells, of columns below them; in full on hover where they are cut."""
    parts = []
    place = Markup('<text class="tick" text-anchor="{}" transform="translate({:.1f} {:.1f}) rotate({})">{}{}</text>')
    for index, (label, short) in enumerate(zip(labels, shown, strict=True)):
        middle = index * cell + cell / 2
        hover = Markup("<title>{}</title>").format(label) if short != label else Markup("")
        parts.append(place.format("end", left - 7, middle + 4, 0, hover, short))
        column = ("end", left + middle + 4, bottom + 12, -50) if slanted else ("middle", left + middle, bottom + 16, 0)
        parts.append(place.format(*column, hover, short))
    return parts


def _svg(width: float, height: float, label: str, *, fixed: bool = False) -> Markup:
    style = Markup(' style="max-width:{:.0f}px"').format(width) if fixed else Markup("")
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}"{}>').format(label, width, height, style)


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, words: str, anchor: str, kind: str) -> Markup:
    tag = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return tag.format(kind, x, y, anchor, escape(words))
