"""Failures of a job on a real API server with the real controllers: root causes, retries, suspension, the way back."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from finetune_api.base import Stage
from finetune_api.report import CheckpointRef

from .harness.api import Resource
from .harness.fake_kubelet import Exit
from .harness.job_scenario import NAME, JobScenario, failing
from .harness.operator import attempt_of, is_true
from .harness.processes import wait_until


def third_rank_fails(scenario: JobScenario, failure_class: str) -> None:
    """Apply the job, and end its training by rank 2, whose peers blame each other before and after it."""
    scenario.apply()
    first, second, third = scenario.until_train()
    scenario.kubelet.end(first, failing("peer", 0))
    scenario.kubelet.end(third, failing(failure_class, 2, "What to do about it."))
    scenario.kubelet.end(second, failing("peer", 1))


def test_the_root_cause_on_another_rank_is_recorded_before_the_child_goes(scenario: JobScenario) -> None:
    third_rank_fails(scenario, "cuda-oom")
    status = scenario.wait(lambda s: any(a.get("reason") == "cuda-oom" for a in s["attempts"]), "recorded")
    (record,) = [a for a in status["attempts"] if a["stage"] == "train" and a["number"] == 1]
    assert (record["rank"], record["counted"]) == (2, True)
    done = scenario.carry_on()
    assert [a["number"] for a in done["attempts"] if a["stage"] == "train"] == [1, 2]


@pytest.mark.parametrize(
    ("failure_class", "ends_as"),
    [
        ("bad-spec", "BadSpec"),
        ("bad-data", "BadData"),
        ("no-access", "NoAccess"),
        ("does-not-fit", "DoesNotFit"),
        ("storage-full", "StorageFull"),
        ("diverged", "Diverged"),
        ("config-changed", "ConfigChanged"),
    ],
)
def test_what_only_a_user_can_mend_ends_the_job_although_other_ranks_spoke_first(
    scenario: JobScenario, failure_class: str, ends_as: str
) -> None:
    third_rank_fails(scenario, failure_class)
    status = scenario.wait(is_true("Failed"), "Failed")
    (failed,) = [c for c in status["conditions"] if c["type"] == "Failed"]
    assert (failed["reason"], "What to do about it." in failed["message"]) == (ends_as, True)
    (record,) = [a for a in status["attempts"] if a["stage"] == "train"]
    assert (record["reason"], record["rank"], record.get("counted", False)) == (failure_class, 2, False)


@pytest.mark.parametrize(
    ("failure_class", "counted"),
    [
        ("host-oom", True),
        ("crash", True),
        ("hang", True),
        ("fenced", True),
        ("preempted", False),
        ("hub-unavailable", False),
    ],
)
def test_what_may_pass_is_retried_and_counted_if_it_may_be_the_jobs_own_fault(
    scenario: JobScenario, failure_class: str, counted: bool
) -> None:
    third_rank_fails(scenario, failure_class)
    status = scenario.wait(lambda s: s.get("attemptsStarted", {}).get("train") == 2, "tried again")
    record = next(a for a in status["attempts"] if a["stage"] == "train")
    assert (record["reason"], record["rank"], record.get("counted", False)) == (failure_class, 2, counted)


def test_bad_data_ends_the_job_with_the_sentence(scenario: JobScenario) -> None:
    scenario.apply()
    (pod,) = scenario.pods(1, Stage.PREPARE)
    scenario.kubelet.end(scenario.kubelet.run(pod), failing("bad-data", 0, "claims.csv, row 7: no label."))
    status = scenario.wait(is_true("Failed"), "Failed")
    (failed,) = [c for c in status["conditions"] if c["type"] == "Failed"]
    assert (failed["reason"], "row 7" in failed["message"]) == ("BadData", True)


@pytest.mark.parametrize("operator", [{"tuned": {"GRACE_MARGIN_SECONDS": 5.0}}], indirect=True, ids=[""])
def test_preempted_while_it_checkpoints_no_new_attempt_starts_until_its_pods_are_gone(scenario: JobScenario) -> None:
    scenario.apply()
    first, second, third = scenario.until_train()
    scenario.kubelet.preempt(second)
    scenario.kubelet.end(first, failing("peer", 0))
    scenario.kubelet.end(third, failing("peer", 2))
    status = scenario.reason("WaitingForPreviousAttempt", 60)
    assert not [a for a in status["attempts"] if a["stage"] == "train" and a["number"] == 2]
    assert scenario.api.find("Pod", second["metadata"]["name"], scenario.namespace)
    (record,) = [a for a in status["attempts"] if a["stage"] == "train"]
    assert (record["reason"], record.get("counted", False)) == ("evicted", False)
    for pod in scenario.api.objects("Pod", scenario.namespace, {"finetune.dev/stage": "train"}):
        if "deletionTimestamp" in pod["metadata"]:
            scenario.kubelet.finish_termination(pod)
    scenario.carry_on()


def test_a_running_job_is_suspended_and_goes_on_from_its_checkpoint(scenario: JobScenario) -> None:
    scenario.apply()
    pods = scenario.until_train()
    attempt = attempt_of(pods[0])
    assert attempt is not None
    scenario.reason("Training")
    scenario.patch({"spec": {"suspend": True}})
    scenario.reason("Suspending")
    checkpoint = CheckpointRef(step=40, path="checkpoints/step-00000040", time=datetime.now(UTC))
    scenario.trainer.report(pods[0], attempt, last_checkpoint=checkpoint)
    for pod in scenario.pods_terminating():
        scenario.kubelet.finish_termination(pod, failing("preempted", 0))
    status = scenario.wait(is_true("Suspended"), "Suspended")
    assert status["lastCheckpoint"]["step"] == 40
    assert not scenario.api.objects("PyTorchJob", scenario.namespace)
    scenario.patch({"spec": {"suspend": False}})
    done = scenario.carry_on()
    assert [a["outcome"] for a in done["attempts"] if a["stage"] == "train"] == ["suspended", "succeeded"]


def test_a_refused_write_token_is_waited_for_after_train(scenario: JobScenario) -> None:
    scenario.apply()

    def script(pod: Resource) -> Exit | None:
        attempt = attempt_of(pod)
        if attempt is not None and attempt.stage is Stage.PUBLISH:
            return failing("no-access", 0, "The token may not write to acme/support.")
        return scenario.trainer.succeeds(pod)

    with scenario.kubelet.playing(scenario.namespace, script):
        status = scenario.reason("WaitingForCredentials", 120)
    assert not is_true("Failed")(status)
    scenario.api.patch(
        {"kind": "Secret", "metadata": {"name": "hf-write", "namespace": scenario.namespace}},
        {"stringData": {"token": "new"}},
    )
    done = scenario.carry_on()
    assert [a["number"] for a in done["attempts"] if a["stage"] == "train"] == [1]


def test_a_failed_job_goes_on_by_the_retry_annotation_and_keeps_what_is_finished(scenario: JobScenario) -> None:
    scenario.apply(retry={"limit": 0})
    for pod in scenario.until_train():
        scenario.kubelet.end(pod, failing("crash", 0))
    scenario.wait(is_true("Failed"), "Failed")
    scenario.patch({"metadata": {"annotations": {"finetune.dev/retry": "1"}}})
    done = scenario.carry_on()
    assert [(a["stage"], a["number"]) for a in done["attempts"]] == [
        ("prepare", 1),
        ("train", 1),
        ("train", 2),
        ("evaluate", 1),
        ("publish", 1),
    ]


def test_a_secret_that_appears_late_is_waited_for(scenario: JobScenario) -> None:
    scenario.api.delete({"kind": "Secret", "metadata": {"name": "hf-read", "namespace": scenario.namespace}})
    scenario.apply()
    status = scenario.reason("WaitingForSecret")
    (ready,) = [c for c in status["conditions"] if c["type"] == "Ready"]
    assert "hf-read" in ready["message"]
    assert not scenario.api.objects("Job", scenario.namespace)


def test_the_same_name_applied_again_at_once_starts_from_the_beginning(scenario: JobScenario) -> None:
    old = scenario.apply()
    scenario.until_train()
    scenario.api.delete(old)
    new = scenario.apply()
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    with scenario.kubelet.playing(scenario.namespace, scenario.trainer.succeeds):
        done = scenario.wait(is_true("Complete"), "Complete", 120)
    assert [a["number"] for a in done["attempts"]] == [1, 1, 1, 1]
    wait_until(lambda: scenario.api.find("FineTuneJob", NAME, scenario.namespace), "the job to be there")
