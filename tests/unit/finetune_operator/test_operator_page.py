import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_variable_that_is_read_is_on_the_page_and_no_other() -> None:
    source = (ROOT / "operator" / "finetune_operator" / "settings.py").read_text()
    read = set(re.findall(r'number\("([A-Z_]+)"', source)) | set(
        re.findall(r'environ\.get\("FINETUNE_([A-Z_]+)"', source)
    )
    page = set(re.findall(r"`FINETUNE_([A-Z_]+)`", (ROOT / "docs" / "operator.md").read_text()))
    assert read == page


def test_the_chart_sets_only_variables_that_are_read() -> None:
    source = (ROOT / "operator" / "finetune_operator" / "settings.py").read_text()
    chart = (ROOT / "charts" / "finetune-operator" / "templates" / "deployment.yaml").read_text()
    for name in re.findall(r"name: FINETUNE_([A-Z_]+)", chart):
        assert f'"{name}"' in source or f"FINETUNE_{name}" in source
