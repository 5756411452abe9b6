"""The numbers of docs/reference-case.md are what `finetune plan` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_operator.cli import run_command_line

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reference-case.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)
OVERRIDES = {"qlora": [], "lora": ["--set", "tuning.method=lora"], "full": ["--set", "tuning={method: full}"]}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `finetune plan` prints for the reference case, in one line."""
    assert run_command_line(["plan", str(ROOT / "examples" / "reference.yaml"), "--price", "1.8", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
def test_the_table_is_the_plan(row: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    method, peak, weights, host_memory, time, hours, price = row
    said = planned(capsys, *OVERRIDES[method])
    assert f"total {peak} " in said
    assert f"weights {weights} " in said
    assert f"Host memory {host_memory} per node" in said
    assert f"about {time} on 12 A100-80GB" in said
    assert f"{hours} GPU-hours; {price} at 1.8 per GPU-hour" in said


def test_the_sentences_are_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert {method for method, *_ in ROWS} == set(OVERRIDES)
    said = planned(capsys)
    assert "332: 2 epochs of 15,875 examples, global batch size 96" in said
    assert "9.2 M total, 2,317 per GPU and step" in said
    assert "up to 2,805 tokens" in said
    assert "42 M of 8.0 B parameters" in said
    assert "48% of 39.4 GiB" in planned(capsys, "--gpu", "A100-40GB")
    one_node = planned(capsys, "--set", "topology.nodes=1")
    assert "weights 1.3 GiB" in one_node
    assert "of peak throughput; less if examples share a prompt prefix" in one_node
    assert "about 11m 37s on 4 A100-80GB" in one_node
    assert "weights 3.7 GiB" in planned(capsys, "--set", "topology.nodes=1", "--set", "tuning.method=lora")


@pytest.mark.parametrize(
    "setting",
    [
        "training.sharedPrefixes=false",
        "training.packing=false",
        "training.neftuneAlpha=5",
        "tuning.lora.dropout=0.1",
        "tuning={method: prompt}",
    ],
)
def test_less_time_is_promised_only_where_prefixes_are_shared(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "--set", setting)
    assert "of peak throughput" in said
    assert "share a prompt prefix" not in said
