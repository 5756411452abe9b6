"""docs/code-map.md: one line per module, from the modules' docstrings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def code_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a repository with two modules."""
    spec = importlib.util.spec_from_file_location("code_map", ROOT / "docs" / "code_map.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    package = tmp_path / "operator" / "finetune_api"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""The resource as data."""\n')
    (package / "spec.py").write_text('"""What a user asks\nfor. Nothing else.\n\nMore.\n"""\n')
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "PAGE", tmp_path / "code-map.md")
    return script


def test_a_module_has_one_line_with_the_first_sentence_of_its_docstring(code_map: ModuleType) -> None:
    page = code_map.render()
    assert "## operator/finetune_api\n\nThe resource as data.\n" in page
    assert "- [spec.py](../operator/finetune_api/spec.py): What a user asks for.\n" in page


def test_a_stale_page_is_reported_with_the_command_that_updates_it(
    code_map: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_map.main(["--check"]) == 1
    assert "run make generate" in capsys.readouterr().err
    assert code_map.main([]) == 0
    assert code_map.main(["--check"]) == 0


def test_a_module_without_a_docstring_is_refused_by_name(code_map: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "operator" / "finetune_api" / "new.py").write_text("x = 1\n")
    with pytest.raises(SystemExit, match=r"operator/finetune_api/new\.py has no docstring"):
        code_map.render()
