"""The list of jobs, from the table that an API server makes."""

from __future__ import annotations

from typing import Any

from finetune_operator.view.jobs_table import layout

COLUMNS: list[dict[str, Any]] = [
    {"name": "Name", "priority": 0},
    {"name": "Phase", "priority": 0},
    {"name": "Loss", "priority": 0},
    {"name": "Method", "priority": 1},
]
ROWS: list[dict[str, Any]] = [
    {"cells": ["a", "Training", 1.23456, "lora"], "object": {"metadata": {"name": "a", "namespace": "ml"}}},
    {"cells": ["longer", "Failed", None, "full"], "object": {"metadata": {"name": "longer", "namespace": "ml"}}},
]


def test_columns_are_as_wide_as_their_widest_cell_and_empty_cells_are_dashes() -> None:
    assert layout(COLUMNS, ROWS, wide=False, places=False, colour=False) == [
        "NAME     PHASE      LOSS",
        "a        Training   1.235",
        "longer   Failed     -",
    ]


def test_wide_shows_all_columns_and_all_namespaces_their_place() -> None:
    lines = layout(COLUMNS, ROWS, wide=True, places=True, colour=False)
    assert lines[0].split() == ["NAMESPACE", "NAME", "PHASE", "LOSS", "METHOD"]
    assert lines[2].split() == ["ml", "longer", "Failed", "-", "full"]


def test_colours_do_not_move_columns() -> None:
    coloured = layout(COLUMNS, ROWS, wide=False, places=False, colour=True)
    assert coloured[2] == "longer   \x1b[31mFailed  \x1b[0m   -"
    plain = [line.replace("\x1b[31m", "").replace("\x1b[0m", "") for line in coloured]
    assert plain == layout(COLUMNS, ROWS, wide=False, places=False, colour=False)


def test_a_status_cannot_steer_the_terminal() -> None:
    evil = {"name": "a", "namespace": "ml\x1b[2J"}
    row = {"cells": ["\x1b]0;PWNED\x07\x1b[2J1/2", "Fai\x9b31mled", "\r\n", ""], "object": {"metadata": evil}}
    lines = layout(COLUMNS, [row], wide=True, places=True, colour=False)
    assert lines[1].split() == ["ml[2J", "]0;PWNED[2J1/2", "Fai31mled", "-", "-"]
