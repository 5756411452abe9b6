"""What happens to a training on real pods when a pod, a process or the memory goes; and that nothing is lost by it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.harness.processes import wait_until

from finetune_api.base import Stage

from .place import JOB, Place, condition_of, is_true

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


@pytest.fixture
def small_volume(place: Place) -> Iterator[Path]:
    """The run's volume, with room for 64 MB."""
    folder = place.places.volumes / place.namespace / "run"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "finetune-test", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_volume_that_is_full_ends_the_job_with_a_sentence_and_a_retry_goes_on(
    place: Place, small_volume: Path, undisturbed: dict[int, float]
) -> None:
    place.apply(publish=None)
    place.trained_to(STEP)
    filler = small_volume / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, check=False)
    status = place.failed()
    assert place.ended()[-1] == ("storage-full", False)
    assert "volume" in condition_of(status, "Failed")["message"]
    filler.unlink()
    place.patch({"metadata": {"annotations": {"finetune.dev/retry": "1"}}})
    wait_until(lambda: is_true(place.status(), "Complete"), "Complete", 600)
    assert place.ended()[-1] == ("succeeded", False)
    assert place.losses() == undisturbed


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


def test_a_job_that_is_applied_again_under_its_name_waits_for_the_old_pods_and_starts_afresh(place: Place) -> None:
    short = {"epochs": 1, "learningRate": 5e-3, "globalBatchSize": 12, "maxSequenceLength": 128, "precision": "fp32"}
    place.apply(publish=None)
    place.trained_to(1)
    before, old = place.run, place.job()["metadata"]["uid"]
    place.kubectl("delete", "finetunejob", JOB, "--wait=false")
    wait_until(lambda: place.api.find("FineTuneJob", JOB, place.namespace) is None, "the old job to go")
    place.apply(publish=None, training=short)
    met = []

    def finished() -> bool:
        uids = {pod["metadata"]["labels"]["finetune.dev/uid"] for pod in place.pods()}
        met.append(len(uids) > 1)
        return is_true(place.status(), "Complete")

    wait_until(finished, "Complete", 800)
    assert not any(met), "pods of both jobs ran at once"
    assert place.job()["metadata"]["uid"] != old
    assert place.run != before
    assert max(place.losses()) == 15
