"""docs/extending.md names the files that a change touches: exactly those in which its example occurs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = {
    "A field of the spec": r"neftune_alpha",
    "A tuning method": r"Method\.PROMPT|PromptTuning\b|tuning\.prompt\b",
    "A task": r"SUMMARIZATION",
    "An objective": r"CrossEntropy\b",
    "A metric": r"macro-f1",
    "A failure class": r"\bFENCED\b",
    "A backend for training pods": r'TrainJobBackend|\btrainjobs\b|"trainjob"',
    "A command": r'"suspend": Entry|def suspend\b',
}
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def files_with(pattern: str) -> set[str]:
    places = ((part, path) for part in ("operator", "trainer", "charts") for path in (ROOT / part).rglob("*"))
    return {
        str(path.relative_to(ROOT))
        for part, path in places
        if path.suffix in ({".tpl", ".json"} if part == "charts" else {".py"})
        and re.search(pattern, path.read_text(encoding="utf-8"))
    }


def test_each_recipe_has_an_example() -> None:
    assert list(RECIPES) == list(EXAMPLES)


@pytest.mark.parametrize("recipe", EXAMPLES)
def test_a_recipe_lists_the_files_of_its_example_and_tests_that_exist(recipe: str) -> None:
    text = RECIPES[recipe]
    assert set(re.findall(r"^\d\. `(\S+)`", text, re.MULTILINE)) == files_with(EXAMPLES[recipe])
    tests = re.findall(r"`(tests/\S+)`", text)
    assert all((ROOT / test).is_file() for test in tests)
    assert "Red until done" in " ".join(text.split())
