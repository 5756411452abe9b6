"""`--set path=value`."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.errors import UserError
from finetune_operator.local.jobfile.overrides import apply_overrides

SPEC: dict[str, Any] = {
    "model": {"repo": "a/b"},
    "datasets": [{"name": "claims", "weight": 1.0}, {"name": "banking77"}],
    "tuning": {"method": "lora"},
}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.epochs=3", ("training", "epochs"), 3),
        ("spec.training.epochs=3", ("training", "epochs"), 3),
        ("training.learningRate=2e-4", ("training", "learningRate"), 2e-4),
        ("training.packing=false", ("training", "packing"), False),
        ("training.betas=[0.9, 0.95]", ("training", "betas"), [0.9, 0.95]),
        ("model.revision=1234", ("model", "revision"), "1234"),
        ("tuning.lora.layers=12-29", ("tuning", "lora", "layers"), "12-29"),
        ("datasets.banking77.weight=0.5", ("datasets", 1, "weight"), 0.5),
        ("datasets.0.task=text", ("datasets", 0, "task"), "text"),
        ("datasets[0].task=text", ("datasets", 0, "task"), "text"),
        ("datasets.claims.columns.text=tweet", ("datasets", 0, "columns", "text"), "tweet"),
        ("publish={repo: acme/x, private: false}", ("publish",), {"repo": "acme/x", "private": False}),
        ("tuning={method: full}", ("tuning", "method"), "full"),
        (
            "podTemplate.nodeSelector.kubernetes.io/arch=arm64",
            ("podTemplate", "nodeSelector", "kubernetes.io/arch"),
            "arm64",
        ),
        (
            "evaluation.gate.minimum.banking77/accuracy=0.9",
            ("evaluation", "gate", "minimum", "banking77/accuracy"),
            0.9,
        ),
    ],
)
def test_a_value_lands_where_its_path_says(override: str, path: tuple[str | int, ...], value: Any) -> None:
    found: Any = apply_overrides(SPEC, [override])
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)


def test_null_takes_a_field_away() -> None:
    assert apply_overrides(SPEC, ["datasets.claims.weight=null"])["datasets"][0] == {"name": "claims"}


def test_the_spec_that_was_given_stays_as_it_was() -> None:
    apply_overrides(SPEC, ["datasets.claims.weight=9", "model.repo=c/d"])
    assert SPEC["datasets"][0]["weight"] == 1.0
    assert SPEC["model"] == {"repo": "a/b"}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.epoch=3", "did you mean training.epochs?"),
        ("epochs=3", "did you mean training.epochs?"),
        ("tuning.lora.targetModule=x", "did you mean tuning.lora.targetModules?"),
        ("datasets.bankng77.weight=1", "did you mean datasets.banking77?"),
        ("datasets.7.weight=1", "it has claims, banking77"),
        ("training.epochs.more=1", "training.epochs is a single value"),
        ("training.epochs", "write it as path=value"),
        ("=3", "write it as path=value"),
        ("training.betas=[1,", "is not valid YAML"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_with_the_nearest(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=r"^--set ") as caught:
        apply_overrides(SPEC, [override])
    assert sentence in caught.value.sentence
