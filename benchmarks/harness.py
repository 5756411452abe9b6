"""What all benchmarks share: sizes, tables, results with their machine, and a few ways to measure.

Nothing here knows what is measured. A result keeps every sample, so that a table can be checked against its file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "trl", "numpy")
MATMUL_SIZE = 2048

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured. `quick` is to see that it runs, `full` takes what the figures deserve."""

    name: str = "normal"
    pairs: int = 5
    """Rounds in which what is compared takes turns."""

    def pick(self, quick: Any, normal: Any, full: Any = None) -> Any:
        """One value for each size; `full` is as `normal` where left out."""
        return {"quick": quick, "full": normal if full is None else full}.get(self.name, normal)


QUICK, NORMAL, FULL = Size("quick", 2), Size(), Size("full", 10)


@dataclass
class Table:
    """One table, cells already written out."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as Markdown, columns aligned so that it can be read in a terminal too."""
        cells = [list(self.head), *(list(row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.head))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([f"**{self.title}**", "", lines[0], rule, *lines[1:]])


@dataclass
class Result:
    """What a benchmark found out."""

    name: str
    figures: Figures
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    """What a reader must know to take the figures rightly."""

    def text(self) -> str:
        """Tables and notes for a terminal or a page."""
        parts = [table.markdown() for table in self.tables] + ["\n".join(f"- {note}" for note in self.notes)]
        return "\n\n".join(part for part in parts if part)

    def write(self, size: Size, directory: Path = RESULTS) -> Path:
        """Keep it as JSON with the machine's shape and the versions; returns the file."""
        directory.mkdir(parents=True, exist_ok=True)
        tables = [{"title": table.title, "head": table.head, "rows": table.rows} for table in self.tables]
        content = {
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "size": size.name,
            "machine": machine(),
            "versions": versions(),
            "figures": self.figures,
            "tables": tables,
            "notes": self.notes,
        }
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def machine() -> Figures:
    """Shape of this machine, and how busy it was."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "instructions": _instructions(),
        "memoryGB": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def _instructions() -> list[str]:
    """The instruction sets that decide how fast matrices are multiplied."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def versions() -> dict[str, str]:
    """Versions of what computes, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


def timed(act: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def in_turn(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples of each contestant, taken in turn; who begins changes from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(contestants[name]())
    return samples


def peak_megabytes(pid: int | str = "self") -> float:
    """The most resident memory that a process had so far, in 10^6 bytes."""
    return _status(pid, "VmHWM") / 1e6


def _status(pid: int | str, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0.0


def matmul_flops(dtype: Any, size: int = MATMUL_SIZE, seconds: float = 0.5, device: Any = "cpu") -> float:
    """Operations per second of a plain square matrix product in this process, 2 n^3 each: the limit on this device."""
    import torch

    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply(times: int) -> None:
        for _ in range(times):
            left @ right
        if left.is_cuda:
            torch.cuda.synchronize()

    multiply(3)
    times = max(3, int(seconds / timed(lambda: multiply(1))))
    return times * 2 * size**3 / timed(lambda: multiply(times))


def own_products_flops(matrices: Sequence[Any], rows: int) -> float:
    """Operations per second of the model's own matrix products, forward and backward, with `rows` rows.

    matrices: [out, in], in the order of the layers, so that they come from memory as in a step."""
    import torch

    of_width = {width: torch.randn(rows, width).to(matrices[0].dtype) for m in matrices for width in m.shape}
    with torch.no_grad():
        for matrix in matrices[:8]:
            of_width[matrix.shape[1]] @ matrix.T
        begun = time.perf_counter()
        for matrix in matrices:
            of_width[matrix.shape[1]] @ matrix.T
        for matrix in reversed(matrices):
            of_width[matrix.shape[0]] @ matrix
        passed = time.perf_counter() - begun
    return 4 * rows * sum(matrix.numel() for matrix in matrices) / passed


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Least-squares slope of y over x."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


# --- writing out -----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (least to most)`."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratio of each pair of samples, taken in the same round."""
    return [one / other for one, other in zip(above, below, strict=True)]
