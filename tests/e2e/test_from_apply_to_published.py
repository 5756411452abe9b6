"""The whole way on real pods: a job is applied, three pods train it, and what is published is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.images import Images

from .conftest import UNDISTURBED
from .place import Place, accuracy


@pytest.mark.timeout(1200)
def test_what_is_published_is_better_and_as_good_as_the_status_says(
    place: Place, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place.apply()
    status = place.complete()
    request.config.cache.set(UNDISTURBED, {Images(place.places).imported("trainer"): place.losses()})

    attempts = [(a["stage"], a["number"], a["outcome"]) for a in status["attempts"]]
    assert attempts == [(stage, 1, "succeeded") for stage in ("prepare", "train", "evaluate", "publish")]
    (metric,) = [m for m in status["results"]["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["difference"]["low"] > 0

    repo = place.hub.repo("acme/days-tuned")
    assert repo.head.id == status["published"]["commit"]
    assert repo.private
    for path, content in repo.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    base, tuned, tokenizer = loaded(place, tmp_path)
    held_out = [json.loads(line) for line in (place.run / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    rows = [(row["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0], row["gold"]) for row in held_out]
    assert len(rows) == metric["rows"]
    assert accuracy(base, tokenizer, rows) == pytest.approx(metric["base"], abs=1e-6)
    assert accuracy(tuned, tokenizer, rows) == pytest.approx(metric["tuned"], abs=1e-6)


def loaded(place: Place, adapter: Path) -> tuple[Any, Any, Any]:
    """The base model, the published adapter on top of it, and its tokenizer, as a user would load them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = adapter.parent / "base"
    for path, content in place.hub.repo("acme/base").files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    base, under = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    return base, PeftModel.from_pretrained(under, adapter), AutoTokenizer.from_pretrained(adapter)
