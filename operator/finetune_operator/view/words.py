"""Numbers and curves as people read them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
LARGEST = 1e300
"""Larger values are left out like infinite ones: their sums would overflow."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Text of somebody else for a terminal: without control characters, which would steer it."""
    return _CONTROL.sub("", text)


def duration(seconds: float | None) -> str:
    """`42s`, `3m 05s`, `2h 07m`, `1d 3h`; empty for nothing."""
    if seconds is None:
        return ""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def size(number: float) -> str:
    """Bytes: `512 MB`, `16.1 GB` (powers of ten, as the Hub counts)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.1f} {unit}" if scaled < 100 else f"{scaled:.0f} {unit}"
    return f"{number:.0f} B"


def amount(step: int, total: int, unit: str) -> str:
    """Progress: `120/450 steps`, `7.5 GB of 16.1 GB`."""
    if unit == "bytes":
        return f"{size(step)} of {size(total)}"
    return f"{step:,}/{total:,} {unit}"


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
    """The curve in at most `width` characters, each the mean of its share of the values.

    Scaled to its own range; logarithmic if all values are positive, so that the end of a falling loss is visible.
    """
    finite = [value for value in values if abs(value) < LARGEST]
    if len(finite) < 2:
        return ""
    points = min(width, len(finite))
    edges = [round(i * len(finite) / points) for i in range(points + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    heights = [math.log(mean) for mean in means] if min(means) > 0 else means
    low = min(heights)
    span = max(heights) - low
    return "".join(BARS[round((height - low) / span * (len(BARS) - 1)) if span else 0] for height in heights)
