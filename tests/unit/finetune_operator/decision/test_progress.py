from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from tests.unit.finetune_operator.decision.world import job, steps

from finetune_api.base import STAGES, Stage
from finetune_api.report import Digests, Published, Report
from finetune_api.status import AttemptRecord, JobStatus, Phase
from finetune_operator.decision.attempts import to_start
from finetune_operator.decision.model import Decision
from finetune_operator.decision.progress import (
    conclusions,
    eta_text,
    merge_products,
    progress_text,
    should_write_status,
)


def is_written(old: JobStatus, new: JobStatus, written: datetime | None, now: datetime) -> bool:
    seen = replace(job().observe(), status=old, now=now)
    return should_write_status(seen, Decision(new, new.to_wire()), written)


def test_an_equal_status_is_not_written() -> None:
    world = job().training()
    assert not is_written(world.status, world.decide().status, None, world.now)


def test_a_new_conclusion_is_written_at_once() -> None:
    world = job().training().finishes()
    assert is_written(world.status, world.decide().status, world.now, world.now)


def test_other_words_for_the_same_conclusions_wait_two_seconds_after_a_write() -> None:
    world = job().training()
    starting = world.status.model_copy(update={"phase": Phase.PREPARING}, deep=True)
    starting.conditions[0].reason, starting.attempts[-1].running_since = "Starting", None
    assert conclusions(starting.to_wire()) != conclusions(world.status.to_wire())
    written = world.now
    assert not is_written(starting, world.status, written, world.now + timedelta(seconds=1))
    assert is_written(starting, world.status, written, world.now + timedelta(seconds=2))
    assert is_written(starting, world.status, None, world.now)


@pytest.mark.parametrize(
    "change",
    [
        {"observed_generation": 7},
        {"attempts_started": {"train": 9}},
        {"observed_retry": "again"},
        {"credentials_seen": "=1"},
    ],
)
def test_what_is_decided_by_is_written_at_once(change: dict[str, object]) -> None:
    world = job().training()
    assert is_written(world.status, world.status.model_copy(update=change), world.now, world.now)


def test_a_condition_that_comes_true_is_written_at_once() -> None:
    world = job().training()
    new = world.status.model_copy(deep=True)
    new.conditions[0].status = "True"
    assert is_written(world.status, new, world.now, world.now)


def test_progress_alone_is_written_at_most_once_a_minute() -> None:
    world = job().training()
    written = world.now
    world.later(59).says(progress=steps(7))
    assert not is_written(world.status, world.decide().status, written, world.now)
    world.later(1)
    assert is_written(world.status, world.decide().status, written, world.now)


def test_a_fresh_process_waits_a_minute_as_well() -> None:
    world = job().training().later(10).settled()
    new = world.says(progress=steps(7)).later(30).decide().status
    assert not is_written(world.status, new, None, world.now)
    assert is_written(world.status, new, None, world.now + timedelta(seconds=31))


def test_conclusions_are_what_does_not_move_all_the_time() -> None:
    world = job().training()
    moved = world.later(500).says(progress=steps(9), activity="compiling").decide().status
    assert conclusions(moved.to_wire()) == conclusions(world.status.to_wire())
    assert moved.active_seconds > world.status.active_seconds


def test_unknown_totals_show_steps_alone() -> None:
    assert [progress_text(steps(*pair)) for pair in ((0, 0), (7, 0), (1, 3))] == ["", "7", "1/3 (33%)"]


def test_warnings_are_said_once_and_bounded() -> None:
    world = job().training()
    for number in range(100):
        world.says(warnings=[f"warning {number}", "the same"]).settled()
    assert len(world.status.warnings) <= 30
    assert world.status.warnings.count("the same") == 1


def test_an_origin_that_cannot_be_read_stops_nothing_and_hides_nothing() -> None:
    world = job().preparing().says(origin={"model": ["no", "text"], "image": "i@1", "seed": {}}).finishes().settled()
    assert world.attempt(Stage.PREPARE, 1).outcome == "succeeded"
    assert (world.status.origin.model, world.status.origin.image, world.status.origin.seed) == ("", "i@1", None)


def test_the_origin_of_every_number_is_gathered_over_the_stages() -> None:
    world = job().preparing().says(origin={"model": "m@abc", "datasets": {"claims": "d@1"}}).finishes().settled()
    world.running().says(origin={"versions": {"torch": "2"}, "seed": 42, "somethingElse": 1}).finishes().settled()
    origin = world.status.origin
    assert (origin.model, origin.datasets, origin.versions, origin.seed) == (
        "m@abc",
        {"claims": "d@1"},
        {"torch": "2"},
        42,
    )
    assert world.attempt(Stage.TRAIN, 1).outcome == "succeeded"


def test_the_time_left_fits_a_column() -> None:
    seconds = [None, 0, 40, 60, 725, 3600, 4800, 90_000]
    assert [eta_text(left) for left in seconds] == ["", "0s", "40s", "1m", "12m", "1h0m", "1h20m", "1d1h"]


def test_a_stage_reports_its_own_products_only() -> None:
    status = JobStatus(digests=Digests(prepared="p"), published=Published(url="https://hub.example/a", digest="e"))
    every = {name: value for stage in STAGES for name, value in job().product(stage).items() if name != "plan"}
    digests = Digests(prepared="forged", export="e", results="forged")
    report = Report.model_validate(
        {"attempt": "u/train/1", "stage": Stage.TRAIN, "time": job().now, "digests": digests, **every}
    )
    before = status.to_wire()
    merge_products(status, report)
    assert status.export == report.export is not None
    assert status.digests == Digests(prepared="p", export="e")
    after = status.to_wire()
    assert {name for name in after if after[name] != before.get(name)} == {"export", "digests"}


@pytest.mark.parametrize(("stage", "known"), zip(STAGES, ["", "p", "pe", "per"], strict=True))
def test_an_attempt_is_told_what_earlier_stages_left(stage: Stage, known: str) -> None:
    status = JobStatus(digests=Digests(prepared="p", export="e", results="r"))
    record = AttemptRecord(stage=stage, number=2, started=job().now)
    told = to_start(replace(job().observe(), status=status), record).digests
    assert told.prepared + told.export + told.results == known
