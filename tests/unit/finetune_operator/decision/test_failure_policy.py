from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.base import Stage
from finetune_api.report import FailureClass
from finetune_operator.decision.failure_policy import (
    POLICIES,
    FailureAction,
    Footprint,
    InfraFailure,
    backoff_seconds,
    condition_reason,
    policy_for,
    shrink,
    waits_for_user,
)

ROOT = Path(__file__).parents[4]


def test_every_failure_class_and_infra_failure_has_a_row() -> None:
    assert set(POLICIES) == set(FailureClass) | set(InfraFailure)


def markdown() -> str:
    actions = {FailureAction.FAIL: "fail", FailureAction.RETRY: "retry", FailureAction.SHRINK: "retry, smaller"}
    rows = ["| class | action | counted | explanation |", "|---|---|---|---|"]
    for reason, policy in POLICIES.items():
        action = actions[policy.action] + (" (after Train: wait)" if policy.waits_after_train else "")
        rows.append(f"| `{reason}` | {action} | {'yes' if policy.counted else 'no'} | {policy.explanation} |")
    return "\n".join([*rows, ""])


def test_the_page_in_docs_shows_the_table() -> None:
    assert markdown() in (ROOT / "docs" / "failure-policy.md").read_text()


@pytest.mark.parametrize("reason", ["bad-spec", "bad-data", "no-access", "does-not-fit", "gate-refused"])
def test_what_only_the_user_can_mend_is_not_tried_again(reason: str) -> None:
    assert policy_for(reason).action is FailureAction.FAIL


@pytest.mark.parametrize(
    ("reason", "counted"),
    [
        ("crash", True),
        ("hang", True),
        ("cuda-oom", True),
        ("host-oom", True),
        ("preempted", False),
        ("evicted", False),
        ("node-lost", False),
        ("partial-gang", False),
    ],
)
def test_only_failures_of_the_job_itself_are_counted(reason: str, counted: bool) -> None:
    assert policy_for(reason).counted is counted
    assert policy_for(reason).action is not FailureAction.FAIL


def test_a_word_that_is_not_known_is_treated_as_a_crash() -> None:
    assert policy_for("from-a-newer-trainer") is POLICIES[FailureClass.CRASH]


@pytest.mark.parametrize(
    ("reason", "stage", "local", "waits"),
    [
        ("no-access", Stage.PUBLISH, False, True),
        ("no-access", Stage.PREPARE, False, False),
        ("no-access", Stage.TRAIN, False, False),
        ("no-access", Stage.PUBLISH, True, False),
        ("crash", Stage.PUBLISH, False, False),
        ("gate-refused", Stage.PUBLISH, False, False),
    ],
)
def test_user_errors_wait_once_a_model_has_been_trained(reason: str, stage: Stage, local: bool, waits: bool) -> None:
    assert waits_for_user(reason, stage, local) is waits


@given(st.text(max_size=40), st.integers(0, 10_000))
def test_backoff_is_pure_and_within_half_and_one_and_a_half_of_the_capped_exponential(name: str, count: int) -> None:
    seconds = backoff_seconds(name, count, 10, 300)
    assert seconds == backoff_seconds(name, count, 10, 300)
    exact = min(10 * 2 ** min(max(count - 1, 0), 40), 300)
    assert 0.5 * exact <= seconds < 1.5 * exact


def test_backoff_differs_between_jobs() -> None:
    assert len({backoff_seconds(f"uid-{i}/train/1", 1, 10, 300) for i in range(100)}) == 100


@given(st.integers(1, 200_000), st.integers(1, 200_000), st.booleans())
def test_shrinking_ends_and_never_goes_below_the_longest_document(tokens: int, longest: int, can: bool) -> None:
    now: Footprint | None = Footprint(max(tokens, longest), False)
    seen = []
    while now is not None:
        assert now.micro_batch_tokens is not None
        assert now.micro_batch_tokens >= longest
        seen.append(now)
        assert len(seen) < 25
        now = shrink(now, longest, can)
    assert seen[-1].micro_batch_tokens == longest
    assert seen[-1].activation_checkpointing is can


def test_without_a_plan_activation_checkpointing_is_all_there_is_to_lower() -> None:
    assert shrink(Footprint(None, False), None, True) == Footprint(None, True)
    assert shrink(Footprint(None, True), None, True) is None


def test_classes_become_reasons_of_conditions() -> None:
    assert [condition_reason(word) for word in ("cuda-oom", "crash", "")] == ["CudaOom", "Crash", "Unknown"]
