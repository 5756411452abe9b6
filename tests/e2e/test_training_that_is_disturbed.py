"""What happens to a training on real pods when a pod, a process or the memory goes; and that nothing is lost by it."""

from __future__ import annotations

import os
import signal

import pytest
from tests.integration.harness.processes import wait_until

from finetune_api.base import Stage

from .place import JOB, Place, is_true

pytestmark = pytest.mark.timeout(1200)
STEP = 6


def test_a_deleted_worker_saves_first_and_costs_no_attempt(place: Place, undisturbed: dict[int, float]) -> None:
    place.apply(publish=None)
    place.trained_to(STEP)
    place.kubectl("delete", "pod", f"{JOB}-train-1-worker-1", "--wait=false")
    status = place.complete()
    first, second = [a for a in status["attempts"] if a["stage"] == Stage.TRAIN]
    assert (first["outcome"], first["counted"]) == ("failed", False)
    assert first["reason"] in ("preempted", "deleted")
    assert second["outcome"] == "succeeded"
    assert second["resumedFromStep"] >= STEP
    assert place.losses() == undisturbed


def test_a_killed_process_costs_an_attempt_and_no_step(place: Place, undisturbed: dict[int, float]) -> None:
    place.apply(publish=None)
    place.trained_to(STEP)
    os.kill(place.rank_process(place.pods()[2]), signal.SIGKILL)
    status = place.complete()
    assert place.ended() == [("crash", True), ("succeeded", False)]
    first, second = [a for a in status["attempts"] if a["stage"] == Stage.TRAIN]
    assert "SIGKILL" in first["message"]
    assert first["rank"] == 2
    assert second["resumedFromStep"] >= STEP - 1
    assert place.losses() == undisturbed


def test_a_pod_at_its_memory_limit_is_told_from_a_crash_and_the_limit_is_named(place: Place) -> None:
    limit = {"resources": {"limits": {"memory": "256Mi"}}}
    place.apply(publish=None, podTemplate=limit, retry={"limit": 0}, topology={"nodes": 1, "gpusPerNode": 0})
    status = place.failed()
    assert place.ended() == [("host-oom", True)]
    (train,) = [a for a in status["attempts"] if a["stage"] == Stage.TRAIN]
    assert "256Mi" in train["message"]
    assert "podTemplate.resources.limits.memory" in train["message"]


def test_a_suspended_job_holds_no_pod_and_goes_on_where_it_was(place: Place, undisturbed: dict[int, float]) -> None:
    place.apply(publish=None)
    place.trained_to(STEP)
    place.patch({"spec": {"suspend": True}})
    place.wait(lambda status: is_true(status, "Suspended"), "Suspended", 120)
    assert place.pods() == []
    place.patch({"spec": {"suspend": False}})
    status = place.complete()
    assert place.ended() == [("suspended", False), ("succeeded", False)]
    assert [a for a in status["attempts"] if a["stage"] == Stage.TRAIN][1]["resumedFromStep"] >= STEP
    assert place.losses() == undisturbed


def test_a_stopped_rank_is_named_with_its_peers_stacks_and_the_attempt_is_retried(
    place: Place, undisturbed: dict[int, float]
) -> None:
    place.apply(publish=None, timeouts={"startup": "5m", "hang": "1m"})
    place.trained_to(STEP)
    os.kill(place.rank_process(place.pods()[1]), signal.SIGSTOP)
    status = place.complete()
    assert place.ended() == [("hang", True), ("succeeded", False)]
    hang = next(a for a in status["attempts"] if a["stage"] == Stage.TRAIN)
    assert "rank 1" in hang["message"].lower()
    for rank in (0, 2):
        assert "train" in (place.run / "logs" / "train-1" / f"stacks-rank{rank}.txt").read_text()
    assert place.losses() == undisturbed


def test_a_deleted_job_takes_its_pods_with_it_and_leaves_the_volume(place: Place) -> None:
    place.apply(publish=None)
    place.trained_to(1)
    kept = place.run
    place.kubectl("delete", "finetunejob", JOB, "--wait=false")
    wait_until(lambda: not place.pods(), "the pods to end within their grace", 60)
    assert list((kept / "checkpoints").glob("step-*"))
    claim = place.api.get("PersistentVolumeClaim", f"{JOB}-run", place.namespace)
    assert "deletionTimestamp" not in claim["metadata"]
