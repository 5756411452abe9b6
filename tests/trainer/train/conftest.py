"""One tiny model for all tests of the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers."""
    return tiny_llama(tmp_path_factory.mktemp("model"))
