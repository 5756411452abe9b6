"""The chart's values are described once, and what is made from the description is up to date."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml
from tests.support.scripts import load_script

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "finetune-operator"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def test_values_and_readme_are_what_the_schema_says() -> None:
    command = [sys.executable, ROOT / "charts" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_values_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = load_script("charts/generate.py", "chart_generate")
    for name in ("values.schema.json", "values.yaml", "README.md"):
        (tmp_path / name).write_text((CHART / name).read_text())
    generate.CHART = tmp_path
    assert generate.main(["--check"]) == 0
    (tmp_path / "values.yaml").write_text("replicas: 7\n")
    assert generate.main(["--check"]) == 1
    assert "values.yaml does not match values.schema.json" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert (tmp_path / "values.yaml").read_text() == (CHART / "values.yaml").read_text()


def test_every_value_is_described_and_closed() -> None:
    for path, node in _nodes(SCHEMA, ""):
        assert node.get("description"), path
        if "properties" in node:
            assert node["additionalProperties"] is False, path


def test_the_defaults_are_valid() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(yaml.safe_load((CHART / "values.yaml").read_text()), SCHEMA)


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project
    assert chart["version"] == chart["appVersion"]


def test_the_dashboard_asks_in_valid_promql() -> None:
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) >= 13
    for target in targets:
        expression = target["expr"]
        for variable in ("$__rate_interval", "$__range"):
            expression = expression.replace(variable, "5m")
        promql_parser.parse(expression)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def _nodes(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, below in schema.get("properties", {}).items():
        yield f"{prefix}{name}", below
        yield from _nodes(below, f"{prefix}{name}.")
