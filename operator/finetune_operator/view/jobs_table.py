"""A list of jobs as lines of text, from the API server's table of the CRD's columns."""

from __future__ import annotations

from typing import Any

from finetune_operator.view.words import printable

STYLES = {"Complete": "32", "Failed": "31", "Suspended": "33", "Waiting": "33", "BackingOff": "33", "Queued": "33"}
"""ANSI colours of phases that need attention or are final."""
GAP = "   "


def place_and_name(row: dict[str, Any]) -> tuple[str, str]:
    """Namespace and name of a row's job."""
    metadata = row["object"]["metadata"]
    return printable(str(metadata["namespace"])), printable(str(metadata["name"]))


def layout(
    columns: list[dict[str, Any]], rows: list[dict[str, Any]], *, wide: bool, places: bool, colour: bool
) -> list[str]:
    """Lines of a table from the API server's table: columns padded to their widest cell, empty cells as `-`."""
    shown = [index for index, column in enumerate(columns) if wide or not column.get("priority")]
    head = [str(columns[index]["name"]).upper() for index in shown]
    body = [[_cell(row["cells"][index]) for index in shown] for row in rows]
    if places:
        head = ["NAMESPACE", *head]
        body = [[place_and_name(row)[0], *cells] for row, cells in zip(rows, body, strict=True)]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    phase = head.index("PHASE") if "PHASE" in head else -1
    return [_line(cells, widths, phase if colour else -1) for cells in [head, *body]]


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(printable(str(value)).split()) or "-"


def _line(cells: list[str], widths: list[int], coloured: int) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    if coloured >= 0 and (style := STYLES.get(cells[coloured])):
        padded[coloured] = f"\x1b[{style}m{padded[coloured]}\x1b[0m"
    return GAP.join(padded).rstrip()
