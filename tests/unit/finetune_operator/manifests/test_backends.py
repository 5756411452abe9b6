"""Each backend is known wherever a backend must be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_operator.cluster.api import KINDS
from finetune_operator.manifests.backends import BACKENDS

CHART = Path(__file__).parents[4] / "charts" / "finetune-operator"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backends_kind_is_known_to_the_client_and_its_name_to_the_chart(name: str) -> None:
    assert KINDS[BACKENDS[name].kind].api_version == BACKENDS[name].api_version
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert name in schema["properties"]["backend"]["enum"]
    assert KINDS[BACKENDS[name].kind].plural in (CHART / "templates" / "_helpers.tpl").read_text(encoding="utf-8")
