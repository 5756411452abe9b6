"""Which fields of a job may change once it has started."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api.spec import FineTuneJob, FineTuneJobSpec
from finetune_api.status import Condition, ConditionType, JobStatus
from finetune_operator.local.jobfile.changes import changed_fields, forbidden_changes, refusal

BASE: dict[str, Any] = {
    "model": {"path": "model"},
    "datasets": [{"name": "claims", "path": "claims.csv"}, {"name": "chats", "path": "chats.jsonl"}],
    "tuning": {"method": "lora"},
}


def spec(**fields: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(BASE | fields)


def status(*kinds: ConditionType) -> JobStatus:
    now = datetime.now(UTC)
    return JobStatus(conditions=[Condition(type=k, status="True", reason="X", last_transition_time=now) for k in kinds])


STOPPED = status(ConditionType.SUSPENDED)
COMPLETE = status(ConditionType.COMPLETE)


def test_a_default_that_is_written_out_is_no_change() -> None:
    assert changed_fields(spec(), spec(training={"epochs": 2})) == []


@pytest.mark.parametrize(
    ("fields", "stopped", "complete"),
    [
        ({"suspend": True}, True, True),
        ({"retry": {"limit": 9}}, True, True),
        ({"timeouts": {"hang": "1h"}}, True, True),
        ({"credentials": {"hub": {"name": "hf"}}}, True, True),
        ({"topology": {"nodes": 2}}, True, False),
        ({"podTemplate": {"env": [{"name": "A", "value": "b"}]}}, True, False),
        ({"training": {"epochs": 3}}, False, False),
        ({"publish": {"path": "x"}}, False, False),
        ({"tuning": {"method": "full"}}, False, False),
    ],
)
def test_fields_change_as_the_contract_allows(fields: dict[str, Any], stopped: bool, complete: bool) -> None:
    found = changed_fields(spec(), spec(**fields))
    assert found
    assert (not forbidden_changes(found, STOPPED)) is stopped
    assert (not forbidden_changes(found, COMPLETE)) is complete


def test_datasets_in_another_order_are_the_same_but_a_renamed_one_is_not() -> None:
    first, second = BASE["datasets"]
    assert changed_fields(spec(), spec(datasets=[second, first])) == []
    renamed = changed_fields(spec(), spec(datasets=[first, {"name": "talks", "path": "chats.jsonl"}]))
    assert "datasets.talks.name" in [change.path for change in renamed]


def test_the_refusal_names_the_field_both_values_and_the_ways_on() -> None:
    found = changed_fields(spec(), spec(training={"epochs": 3}))
    job = FineTuneJob.model_validate({"metadata": {"name": "tiny"}, "spec": BASE})
    sentence = refusal(job, found, STOPPED, "/runs/x")
    for part in ("training.epochs (2.0 → 3.0)", "metadata.name", "--fresh", "/runs/x"):
        assert part in sentence
