from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.base import Stage
from finetune_api.report import Failure, FailureClass, Report
from finetune_operator.decision.model import Child, Pod, PodPhase
from finetune_operator.decision.root_cause import find

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def failed(index: int, kind: str | None = None, after: int = 0, **what: object) -> Pod:
    when = NOON + timedelta(seconds=after)
    failure = kind and Failure(failure_class=FailureClass(kind), sentence=f"{kind} there", rank=index, time=when)
    facts: dict[str, object] = {"phase": PodPhase.FAILED, "finished": when, "failure": failure or None}
    return Pod(f"pod-{index}", index, **(facts | what))  # type: ignore[arg-type]


def child(*pods: Pod, expected: int | None = None, **what: object) -> Child:
    return Child(Stage.TRAIN, 1, failed=True, pods=pods, pods_expected=expected or len(pods), **what)  # type: ignore[arg-type]


CASES: list[tuple[str, Child, str, int | str | None]] = [
    ("a peer's time-out is never the cause", child(failed(0, "peer"), failed(1, "cuda-oom", 5)), "cuda-oom", 1),
    ("the earliest cause wins", child(failed(0, "crash", 9), failed(1, "crash", 3)), "crash", 1),
    ("a hang that a lost node explains", child(failed(0, "hang"), Pod("p", 1, node_lost=True)), "node-lost", "pod p"),
    (
        "a preemption that an eviction explains",
        child(failed(0, "preempted"), failed(1, evicted=True)),
        "evicted",
        "pod-1",
    ),
    ("bad data is bad data on any node", child(failed(0, "bad-data", 5), Pod("p", 1, node_lost=True)), "bad-data", 0),
    ("a host out-of-memory without a word", child(failed(0, "peer"), failed(1, oom_killed=True)), "host-oom", "pod-1"),
    ("an exit code that names its class", child(failed(0, exit_code=68)), "cuda-oom", "pod-0"),
    ("a peer's exit code is not the cause", child(failed(0, exit_code=72), failed(1, "crash", 4)), "crash", 1),
    ("a segmentation fault", child(failed(0, exit_code=139)), "crash", "pod-0"),
    ("a pod stopped from outside", child(failed(0, exit_code=143)), "deleted", "pod-0"),
    ("a pod deleted and killed after its grace", child(failed(0, exit_code=137, terminating=True)), "deleted", "pod-0"),
    ("a silent pod earlier than a loud one", child(failed(0, "crash", 9), failed(1, exit_code=139)), "crash", "pod-1"),
    ("a limit of its own", child(failed(0, evicted=True, over_own_limit=True)), "over-limit", "pod-0"),
    ("a kubelet that refuses", child(failed(0, refused=True, message="no healthy devices")), "not-admitted", "healthy"),
    ("a program that is not there", child(failed(0, exit_code=128, message="no python")), "crash", "no python"),
    ("a pod that is gone", child(failed(0, "peer"), expected=2), "deleted", None),
    ("all blame each other", child(failed(0, "peer"), failed(1, "peer", 1)), "peer", None),
    ("no pod at all", child(message="BackoffLimitExceeded", expected=0), "crash", None),
]


@pytest.mark.parametrize(("what", "seen", "reason", "where"), CASES, ids=[case[0] for case in CASES])
def test_root_cause(what: str, seen: Child, reason: str, where: int | str | None) -> None:
    """where: the rank that reported it, or the pod that the sentence names."""
    cause = find(seen, None)
    assert cause.reason == reason
    if isinstance(where, str):
        assert where in cause.sentence
    assert cause.rank == (None if isinstance(where, str) else where)
    assert cause.sentence.endswith((".", "there", "Exceeded"))


@pytest.mark.parametrize("over_own_limit", [False, True])
def test_an_eviction_quotes_the_kubelet(over_own_limit: bool) -> None:
    message = "Pod ephemeral local storage usage exceeds the total limit of containers 2Gi. "
    sentence = find(child(failed(0, evicted=True, over_own_limit=over_own_limit, message=message)), None).sentence
    assert "usage exceeds the total limit of containers 2Gi." in sentence
    assert ("podTemplate.resources.limits" in sentence) == over_own_limit


def test_a_host_out_of_memory_names_the_limit_to_raise() -> None:
    cause = find(child(failed(2, oom_killed=True, memory_limit="64Gi")), None)
    assert "64Gi" in cause.sentence
    assert "podTemplate.resources.limits.memory" in cause.sentence


def test_a_host_out_of_memory_that_a_rank_told_of_names_the_limit_too() -> None:
    cause = find(child(failed(1, "host-oom", memory_limit="64Gi")), None)
    assert cause.reason is FailureClass.HOST_OOM
    assert cause.sentence.endswith("The current limit is 64Gi.")


def test_a_kill_without_a_mark_says_that_memory_may_be_the_reason() -> None:
    cause = find(child(failed(0, exit_code=137, memory_limit="32Gi")), None)
    assert cause.reason is FailureClass.CRASH
    assert "32Gi" in cause.sentence


def test_the_report_counts_as_evidence_when_the_pods_are_gone() -> None:
    failure = Failure(failure_class=FailureClass.DIVERGED, sentence="The loss spiked.", rank=0, time=NOON)
    report = Report(attempt="u/train/1", stage=Stage.TRAIN, time=NOON, failure=failure)
    assert find(child(expected=2), report).reason is FailureClass.DIVERGED


def test_the_field_is_said_where_the_sentence_does_not_name_it() -> None:
    failure = Failure(failure_class=FailureClass.BAD_DATA, sentence="Row 3 is empty.", field="claims", time=NOON)
    pod = Pod("p", 0, PodPhase.FAILED, failure=failure)
    assert find(child(pod), None).sentence == "Row 3 is empty. (claims)"
