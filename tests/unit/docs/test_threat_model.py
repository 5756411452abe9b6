"""The threat model names a test for each claim, and each of these tests exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.partition("## Threat model")[2].splitlines() if line.startswith("| ")][1:]


def test_every_row_names_what_is_prevented_and_a_test() -> None:
    assert len(ROWS) > 20
    for row in ROWS:
        _, _, _, prevented, tests, _ = (cell.strip() for cell in row.split("|"))
        assert prevented
        assert re.fullmatch(r"(`[\w/]+\.py::test_\w+`( |$))+", tests), row


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.py::test_\w+)`", PAGE))))
def test_a_test_of_the_threat_model_exists(name: str) -> None:
    path, _, test = name.partition("::")
    assert re.search(rf"^(async )?def {test}\(", (ROOT / "tests" / path).read_text(encoding="utf-8"), re.MULTILINE)
