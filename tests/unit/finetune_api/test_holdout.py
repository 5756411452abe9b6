"""How many rows are held out by default, and whether the gate can be decided on them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.support.jobs import job

from finetune_api.holdout import LEAST_ROWS, Shares, held_out_shares, measured_rows, undecidable
from finetune_api.spec import FineTuneJobSpec


def spec_of(**changes: Any) -> FineTuneJobSpec:
    return job({name.replace("__", "."): value for name, value in {"spec__split": {}, **changes}.items()}).spec


LAST = {"spec__training.keepBest": False}


@pytest.mark.parametrize(
    ("rows", "changes", "shares"),
    [
        (1000, {}, Shares(0.2, 0)),
        (300, {}, Shares(0.2, 0)),
        (150, {}, Shares(0.4, 0)),
        (120, {}, Shares(0.5, 0)),
        (119, {}, Shares(0.2, 0)),
        (150, LAST, Shares(0.2, 0)),
        (100, LAST, Shares(0.3, 0)),
        (60, LAST, Shares(0.5, 0)),
        (59, LAST, Shares(0.2, 0)),
        (1, LAST, Shares(0.2, 0)),
        (100, {"spec__split": {"test": 0.3}}, Shares(0.2, 0.3)),
        (100, {"spec__split": {"validation": 0.2}}, Shares(0.2, 0)),
        (100, {"spec__split": {"validation": 0}} | LAST, Shares(0, 0)),
        (100, {"spec__datasets.0.splits": {"test": "test"}}, Shares(0.2, 0)),
        (100, {"spec__datasets.0.splits": {"validation": "dev"}}, Shares(0, 0)),
    ],
)
def test_a_small_dataset_holds_out_more_where_that_lets_it_be_measured(
    rows: int, changes: dict[str, Any], shares: Shares
) -> None:
    spec = spec_of(**changes)
    found = held_out_shares(spec, spec.datasets[0], rows)
    assert (found.validation, found.test) == pytest.approx((shares.validation, shares.test))


def sentence(spec: FineTuneJobSpec, rows: int) -> str:
    def measured(changed: FineTuneJobSpec) -> dict[str, int]:
        count = measured_rows(changed, changed.datasets[0], rows)
        assert count is not None
        return {changed.datasets[0].name: count}

    return undecidable(spec, measured(spec), measured)


@given(
    st.integers(1, 2000),
    st.sampled_from([{}, LAST]),
    st.sampled_from([None, 0, 0.05, 0.2, 0.5]),
    st.sampled_from([0, 0.01, 0.2, 0.4]),
    st.sampled_from([None, 5, 29, 30, 100]),
)
def test_a_gate_is_refused_exactly_where_too_few_rows_are_measured_and_the_advice_works(
    rows: int, last: dict[str, Any], validation: float | None, test: float, max_rows: int | None
) -> None:
    assume(validation is None or validation + test > 0)
    split = {"validation": validation, "test": test} if validation is not None else {"test": test}
    wire = spec_of(spec__split=split, **last, **({"spec__evaluation.maxRows": max_rows} if max_rows else {})).to_wire()
    spec = FineTuneJobSpec.model_validate(wire)
    said = sentence(spec, rows)
    measured = measured_rows(spec, spec.datasets[0], rows) or 0
    assert bool(said) == (measured < LEAST_ROWS)
    if not said:
        return
    if "raise evaluation.maxRows" in said:
        wire["evaluation"]["maxRows"] = LEAST_ROWS
    advised = re.search(r"set split: (\{.*?\})", said)
    if advised:
        wire["split"] = {**wire["split"], **yaml.safe_load(advised[1])}
    if not advised and "use more rows" in said:
        assert rows * 0.6 < LEAST_ROWS + 1
        wire.setdefault("evaluation", {})["gate"] = {"mustImprove": False}
    assert sentence(FineTuneJobSpec.model_validate(wire), rows) == ""


def test_minimum_metrics_need_a_row_and_name_a_split_that_gives_one() -> None:
    spec = spec_of(
        spec__split={"validation": 0.01},
        **{"spec__evaluation.gate": {"mustImprove": False, "minimum": {"tweets/accuracy": 0.5}}},
    )
    said = sentence(spec, 20)
    assert "no rows are held out for tweets/accuracy of evaluation.gate.minimum" in said
    assert "set split: {validation: 0.1, test: 0.05}" in said
    assert sentence(spec, 2000) == ""


def test_a_dataset_without_rows_is_not_measured_and_one_with_few_is_named() -> None:
    spec = spec_of()
    none = {"tweets": 300, "own": 0}
    assert undecidable(spec, none, lambda _: none) == ""
    few = {"tweets": 300, "own": 7}
    assert "7 of own would be measured" in undecidable(spec, few, lambda _: few)
    assert "0 of tweets" in undecidable(spec, {"tweets": 0}, lambda _: {"tweets": 0})
