"""Every cross-field rule refuses what it must, with its sentence, and its neighbour that is right passes."""

from __future__ import annotations

import pytest
from tests.support.jobs import BROKEN, CHANGES_ALLOWED, Broken, job, manifest

from finetune_api.base import ApiModel, Rule
from finetune_api.cel import violations
from finetune_api.fields import submodel
from finetune_api.spec import MUTABILITY, OPTIONAL_FIELDS, FineTuneJob, FineTuneJobSpec
from finetune_api.structure import show_path


def _found(broken: Broken) -> list[tuple[str, str]]:
    before = None if broken.before is None else job(broken.before)
    return [(show_path(found.path), found.rule.message) for found in violations(job(broken.changes), before)]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.path}: {broken.says}")
def test_a_broken_rule_is_named_with_field_and_sentence_and_nothing_else_is(broken: Broken) -> None:
    found = _found(broken)
    assert [path for path, _ in found] == [broken.path]
    assert found[0][1].startswith(broken.says)


@pytest.mark.parametrize("broken", [broken for broken in BROKEN if broken.valid], ids=lambda broken: broken.path)
def test_a_rule_lets_the_neighbour_that_is_right_pass(broken: Broken) -> None:
    assert list(violations(job(broken.valid))) == []


@pytest.mark.parametrize(("before", "after"), CHANGES_ALLOWED)
def test_what_may_change_can_be_changed(before: dict[str, object], after: dict[str, object]) -> None:
    assert list(violations(job(after), job(before))) == []


def test_applying_the_same_job_again_changes_nothing() -> None:
    same = {"spec.publish.repo": "a/b", "spec.image": "trainer:1"}
    assert list(violations(job(same), job(same))) == []


def _rules(model: type[ApiModel], path: str = "") -> list[tuple[str, Rule]]:
    rules = [(path, rule) for rule in model.cel_rules]
    for name, field in model.model_fields.items():
        if below := submodel(field.annotation):
            rules += _rules(below, f"{path}.{field.alias or name}".lstrip("."))
    return rules


def test_every_rule_has_a_job_that_breaks_it() -> None:
    broken = [(item.path, item.says) for item in BROKEN]
    for path, rule in _rules(FineTuneJob):
        where = f"{path}{rule.field}".lstrip(".")
        assert any(rule.message.startswith(says) and place.replace("[0]", "") == where for place, says in broken), (
            f"no test breaks {where}: {rule.message}"
        )


def test_every_field_of_the_spec_says_when_it_may_change() -> None:
    fields = FineTuneJobSpec.model_fields
    assert list(MUTABILITY) == [field.alias or name for name, field in fields.items()]
    absent = [field.alias or name for name, field in fields.items() if field.default is None]
    assert tuple(absent) == OPTIONAL_FIELDS


def test_a_sentence_says_what_to_do_and_is_no_longer_than_a_message_may_be() -> None:
    for _, rule in _rules(FineTuneJob):
        assert len(rule.message) < 300
        assert not rule.message.endswith(".")


def test_the_small_job_is_valid() -> None:
    assert list(violations(FineTuneJob.model_validate(manifest()))) == []
