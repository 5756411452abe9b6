"""How `run` and `watch` show a job. Imports no screen until one is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_operator.view.outputs import Output


class OutputFormat(StrEnum):
    """How to follow a job."""

    TEXT = "text"
    JSON = "json"

    @property
    def live(self) -> bool:
        """Whether it is redrawn in place: text, on a terminal."""
        return self is OutputFormat.TEXT and sys.stdout.isatty()


def output_of(output_format: OutputFormat, resource: Callable[[], dict[str, Any]]) -> Output:
    """The output that shows the job on stdout; `resource` returns the whole of it for the last line in JSON."""
    from finetune_operator.view.outputs import JsonOutput, LiveOutput, PlainOutput

    if output_format is OutputFormat.JSON:
        return JsonOutput(sys.stdout, resource)
    if output_format.live:
        from rich.console import Console

        return LiveOutput(Console())
    return PlainOutput(sys.stdout)
