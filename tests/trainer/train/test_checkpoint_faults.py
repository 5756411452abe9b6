"""What happens to a checkpoint: damaged, without space, under another config, by another attempt, in retention."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.jobs import job as a_job
from tests.trainer.train.hooks import at_step, disk_full, fence_taken_at
from tests.trainer.train.jobs import DatasetOf, Job, make_job, train

from finetune_api.report import EXIT_CODES, Failure, FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.train.checkpoint import Checkpoints, retained
from finetune_trainer.train.identity import refuse_other, refuse_other_weights, training_identity
from finetune_trainer.train.processes import init_distributed

LENGTHS = [20, 31, 17, 44, 25, 60, 13, 38]
TRAINING = {"globalBatchSize": 4, "maxSteps": 4, "validateEvery": 4, "learningRate": 1e-3}


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    job = make_job(tmp_path, model, [DatasetOf("a", LENGTHS)])
    job.configure(training=TRAINING, checkpoint={"everyMinutes": 0, "keep": 3})
    return job


def failure_of(job: Job) -> Failure:
    failure = job.report().failure
    assert failure is not None
    return failure


def flip_a_byte(checkpoint: Path) -> str:
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "__0_0.distcp is corrupt: its checksum differs"


def cut_a_file(checkpoint: Path) -> str:
    file = checkpoint / "__0_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    return f"__0_0.distcp has {size - 1} bytes instead of {size}"


def lose_a_file(checkpoint: Path) -> str:
    (checkpoint / ".metadata").unlink()
    return ".metadata is missing"


def lose_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "manifest.json is missing"


def change_the_manifest(checkpoint: Path) -> str:
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace('"rollbacks": 0', '"rollbacks": 1'))
    return "manifest.json is corrupt: its checksum differs"


def cut_the_manifest(checkpoint: Path) -> str:
    os.truncate(checkpoint / "manifest.json", 100)
    return "manifest.json cannot be read"


DAMAGES = [flip_a_byte, cut_a_file, lose_a_file, lose_the_manifest, change_the_manifest, cut_the_manifest]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Job:
    """A job whose only attempt was killed in its fourth step. Tests take copies of it."""
    job = make_job(tmp_path_factory.mktemp("interrupted"), model, [DatasetOf("a", LENGTHS)])
    job.configure(training=TRAINING, checkpoint={"everyMinutes": 0, "keep": 3})
    assert -9 in train(job, 1, partial(at_step, 3, "SIGKILL"))
    return job


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process only."""
    yield init_distributed(torch.device("cpu"), 0, 1, 60)
    dist.destroy_process_group()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_and_the_checkpoint_before_it_is_found(
    interrupted: Job, tmp_path: Path, alone: dist.ProcessGroup, damage: Callable[[Path], str]
) -> None:
    job = interrupted.copy(tmp_path)
    before, newest = job.saved()[-2:]
    problem = damage(job.checkpoints / f"step-{newest:08d}")
    checkpoints = Checkpoints(job.checkpoints, alone, keep=3, attempt="a", identity={}, check_fence=lambda: None)
    found = checkpoints.newest()
    assert found is not None
    assert found.manifest.step == before
    assert checkpoints.damaged == {str(job.checkpoints / f"step-{newest:08d}"): problem}


def test_training_goes_on_from_before_a_damaged_checkpoint_and_says_so(interrupted: Job, tmp_path: Path) -> None:
    job = interrupted.copy(tmp_path)
    before, newest = job.saved()[-2:]
    problem = flip_a_byte(job.checkpoints / f"step-{newest:08d}")
    assert train(job) == [0]
    assert job.report().resumed_from_step == before
    assert job.report().warnings == [
        f"Checkpoint step-{newest:08d} is damaged ({problem}); resuming from step {before}."
    ]
    assert [row["step"] for row in job.rows()] == [1, 2, 3, 4]
    assert job.saved()[-1] == 4


def test_training_starts_again_where_every_checkpoint_is_damaged(interrupted: Job, tmp_path: Path) -> None:
    job = interrupted.copy(tmp_path)
    for checkpoint in job.checkpoints.glob("step-????????"):
        lose_the_manifest(checkpoint)
    assert train(job) == [0]
    assert job.report().resumed_from_step is None
    assert all("starting from the beginning" in warning for warning in job.report().warnings)


@pytest.mark.parametrize("part", [".distcp", "manifest.json", ".metadata"])
def test_a_full_disk_ends_in_a_sentence_and_leaves_the_last_checkpoint_whole(job: Job, part: str) -> None:
    assert train(job, 2, partial(disk_full, part, 2)) == [EXIT_CODES[FailureClass.STORAGE_FULL]] * 2
    failure = failure_of(job)
    assert failure.sentence.startswith(f"No space left for checkpoint {job.checkpoints}/step-00000002: ")
    assert " free; the last checkpoint has " in failure.sentence
    assert "Checkpoint 1 is intact." in failure.sentence
    assert failure.field == "storage.run.size"
    assert sorted(path.name for path in job.checkpoints.iterdir()) == ["step-00000000", "step-00000001"]


def test_an_attempt_that_was_replaced_publishes_nothing_more(job: Job) -> None:
    fence = str(job.run / "fence.json")
    assert train(job, 2, partial(fence_taken_at, 2, fence)) == [EXIT_CODES[FailureClass.FENCED]] * 2
    assert "uid-1/train/99 has taken over" in failure_of(job).sentence
    assert max(job.saved()) <= 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training.learningRate": 2e-3}, "training.learningRate"),
        ({"training.globalBatchSize": 3}, "training.globalBatchSize"),
        ({"training.scheduler": {"type": "linear"}}, "training.scheduler.type"),
        ({"tuning.lora": {"rank": 4, "alpha": 8}}, "tuning.lora.alpha"),
        ({"datasets.0.weight": 2}, "datasets[0].weight"),
        ({"split.seed": 7}, "split.seed"),
    ],
)
def test_a_config_that_changed_under_a_checkpoint_is_refused_by_the_fields_name(
    changes: dict[str, object], field: str
) -> None:
    was, now = (training_identity(a_job(c).spec, "base", "data") for c in ({}, changes_of(changes)))
    with pytest.raises(TrainerError) as refusal:
        refuse_other(was, now, "Checkpoint step-00000002")
    assert refusal.value.field == field
    assert refusal.value.failure_class is FailureClass.CONFIG_CHANGED
    assert refusal.value.sentence.startswith(f"Checkpoint step-00000002 was written with {field} = ")


def changes_of(paths: dict[str, object]) -> dict[str, object]:
    """The same, below the spec."""
    return {f"spec.{path}": value for path, value in paths.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"training.validateEvery": 3},
        {"training.compile": True},
        {"training.activationCheckpointing": True},
        {"training.keepBest": False},
        {"topology.nodes": 2},
        {"checkpoint.keep": 9},
        {"tuning.prompt": {"virtualTokens": 3}},
    ],
)
def test_how_it_is_computed_and_what_the_method_does_not_use_may_change(changes: dict[str, object]) -> None:
    was, now = (training_identity(a_job(c).spec, "base", "data") for c in ({}, changes_of(changes)))
    refuse_other(was, now, "Checkpoint")


def test_another_base_or_other_data_is_refused() -> None:
    was = training_identity(a_job().spec, "base", "data")
    for now, field in (("other", "data"), "model"), (("base", "other"), "prepared data"):
        with pytest.raises(TrainerError) as refusal:
            refuse_other(was, training_identity(a_job().spec, *now), "Checkpoint")
        assert refusal.value.field == field


@pytest.mark.parametrize(
    ("was", "now", "field"),
    [
        ({"init": "pissa"}, {}, "tuning.lora.init"),
        ({}, {"init": "pissa"}, "tuning.lora.init"),
        ({"init": "pissa"}, {"init": "pissa"}, "training.seed"),
        ({"init": "gaussian"}, {"dropout": 0.1}, None),
    ],
)
def test_weights_of_pissa_are_taken_over_only_beside_the_same_rest_of_the_base(
    was: dict[str, object], now: dict[str, object], field: str | None
) -> None:
    first, second = (
        training_identity(a_job({"spec.tuning.lora": lora, "spec.training.seed": seed}).spec, "base", "data")
        for seed, lora in enumerate((was, now))
    )
    if field is None:
        refuse_other_weights(first, second, "Checkpoint")
        return
    with pytest.raises(TrainerError) as refusal:
        refuse_other_weights(first, second, "Checkpoint")
    assert refusal.value.field == field


def test_a_changed_config_ends_the_attempt_at_once(interrupted: Job, tmp_path: Path) -> None:
    job = interrupted.copy(tmp_path)
    job.configure(training={**TRAINING, "learningRate": 2e-3})
    assert train(job) == [EXIT_CODES[FailureClass.CONFIG_CHANGED]]
    assert failure_of(job).field == "training.learningRate"


def test_smaller_micro_batches_and_recomputed_activations_go_on_from_a_checkpoint(
    interrupted: Job, tmp_path: Path
) -> None:
    job = interrupted.copy(tmp_path)
    job.configure(training={**TRAINING, "activationCheckpointing": True, "validateEvery": 2})
    assert train(job, microBatchTokens=60) == [0]
    assert (job.report().resumed_from_step or 0) > 0


@pytest.mark.parametrize(
    ("steps", "keep", "best", "before", "kept"),
    [
        ([1, 2, 3, 4, 5], 3, None, None, {3, 4, 5}),
        ([1, 2, 3, 4, 5], 1, 2, None, {2, 5}),
        ([1, 2, 3, 4, 5], 1, 9, None, {5}),
        ([0, 10, 20, 30, 40], 1, None, 25, {20, 30, 40}),
        ([0, 10, 20], 1, None, 5, {0, 10, 20}),
        ([5, 10, 20, 30], 1, None, 2, {5, 30}),
        ([7], 1, None, None, {7}),
    ],
)
def test_which_checkpoints_are_kept(
    steps: list[int], keep: int, best: int | None, before: int | None, kept: set[int]
) -> None:
    assert retained(steps, keep, best, before) == kept


def test_the_newest_the_best_and_the_way_back_are_kept(job: Job) -> None:
    job.configure(training={**TRAINING, "validateEvery": 1, "maxSteps": 6}, checkpoint={"everyMinutes": 0, "keep": 2})
    assert train(job) == [0]
    best = [row["step"] for row in job.validations() if row["best"]][-1]
    assert set(job.saved()) == {0, 1, 5, 6} | {best}
    last = job.report().last_checkpoint
    assert last is not None
    assert last.path == "checkpoints/step-00000006"


@pytest.mark.parametrize(("minutes", "saved"), [(0, [0, 1, 2, 3]), (1000, [0, 3])])
def test_minutes_between_checkpoints_are_those_of_the_spec(job: Job, minutes: int, saved: list[int]) -> None:
    training = {**TRAINING, "maxSteps": 3, "keepBest": False}
    job.configure(training=training, checkpoint={"everyMinutes": minutes, "keep": 9})
    assert train(job) == [0]
    assert job.saved() == saved
