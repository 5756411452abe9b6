"""How the targets of this folder are hunted: what strangers may have written, for a while, within bounds.

`make test` tries the same few examples each time; `make fuzz` tries new ones for FINETUNE_FUZZ_SECONDS a target, and
Hypothesis keeps and shrinks what fails.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.support.time_limits import scaled

SECONDS = float(os.environ.get("FINETUNE_FUZZ_SECONDS", "0"))
EXAMPLES = 500 if SECONDS else 40
CPU_SECONDS = 5.0
"""Of one example: what takes longer would hold up a stage that holds nothing, or the operator."""
MEMORY_BYTES = 1 << 30
"""By which one example may raise the process's peak."""

ODD_NUMBERS = (0, 1, -1, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
ODD_BYTES = tuple(
    number.to_bytes(size, "little", signed=number < 0)
    for number in ODD_NUMBERS
    for size in (1, 2, 4, 8)
    if -(1 << (8 * size - 1)) <= number < 1 << (8 * size)
)


def hunt(examples: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
    """Call `check` with examples until the time is up; whatever it raises is a finding."""

    def bounded(example: Any) -> None:
        begun, peak = time.process_time(), _peak()
        check(example)
        assert time.process_time() - begun < scaled(CPU_SECONDS), "takes long"
        assert _peak() - peak < MEMORY_BYTES, "takes much memory"

    rounds = settings(
        deadline=None,
        max_examples=EXAMPLES,
        derandomize=not SECONDS,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=bool(SECONDS),
    )
    end = time.monotonic() + SECONDS
    while True:
        rounds(given(examples)(bounded))()
        if time.monotonic() >= end:
            return


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@st.composite
def damaged(draw: st.DrawFn, samples: list[bytes], words: tuple[bytes, ...] = ()) -> bytes:
    """A sound file with up to five places overwritten, cut out, repeated or filled with what its format knows."""
    data = bytearray(draw(st.sampled_from(samples)))
    pieces = st.binary(min_size=1, max_size=8) | st.sampled_from((*words, *ODD_BYTES))
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(data)))
        stop = min(start + draw(st.integers(0, 64)), len(data))
        piece = draw(pieces)
        match draw(st.sampled_from(("insert", "overwrite", "cut", "repeat", "end"))):
            case "insert":
                data[start:start] = piece
            case "overwrite":
                data[start : start + len(piece)] = piece
            case "cut":
                del data[start:stop]
            case "repeat":
                data[start:start] = data[start:stop] * draw(st.integers(1, 50))
            case "end":
                del data[start:]
    return bytes(data)


LEAVES: Any = st.sampled_from(
    [None, True, -1, 0, 1.5, 2**53, 10**30, 1e308, "", "/etc/passwd", "../x", "\ud800", "\x00", "x" * 5000, "a: b"]
) | st.text(max_size=8)
JSON: Any = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, below in inner for found in places(below, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, sample: Any, most: int = 3) -> Any:
    """A JSON value with up to `most` places replaced by other JSON, or removed."""
    import copy

    result = copy.deepcopy(sample)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(result)))
        if not path:
            return draw(JSON)
        holder = result
        for key in path[:-1]:
            holder = holder[key]
        if draw(st.booleans()) or draw(st.booleans()):
            holder[path[-1]] = draw(JSON)
        else:
            del holder[path[-1]]
    return result
