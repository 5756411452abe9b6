"""Numbers and curves as people read them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float | None) -> str:
    """`42 s`, `3:05 min`, `2:07 h`, `1 d 3 h`."""
    if seconds is None:
        return ""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def count(number: float) -> str:
    """`1,204`, `135 M`, `8.0 B`."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.1f} {unit}" if scaled < 10 else f"{scaled:.0f} {unit}"
    return f"{number:,.0f}"


def measure(value: float | None, signed: bool = False) -> str:
    """Three decimals, `–` for nothing: `0.623`, `+0.208`."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def rate(value: float) -> str:
    """A learning rate: `5e-04`, `1.9e-05`."""
    return f"{value:.1e}".replace(".0e", "e")


def sparkline(values: Sequence[float], width: int) -> str:
    """The curve in `width` characters at most, each the mean of its share of the values; scaled to its own range."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    points = min(width, len(finite))
    edges = [round(i * len(finite) / points) for i in range(points + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
