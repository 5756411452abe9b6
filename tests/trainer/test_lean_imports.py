"""What a stage's process does not import, and how it imports the rest."""

from __future__ import annotations

import gc
import importlib.util
import sys

import pytest

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.imports import bring_back, few_walks, leave_out, left_out, unneeded
from finetune_trainer.prepare.workers import PARALLEL_ROWS, Workers

DATASET = {"name": "a", "path": "a.csv", "task": "classification"}


@pytest.mark.parametrize(
    ("method", "stage", "gpus", "left_out"),
    [
        ("lora", Stage.TRAIN, 0, ["bitsandbytes", "triton", "scipy"]),
        ("full", Stage.TRAIN, 4, ["bitsandbytes", "scipy"]),
        ("qlora", Stage.TRAIN, 4, ["scipy"]),
        ("qlora", Stage.EVALUATE, 4, []),
        ("lora", Stage.EVALUATE, None, ["bitsandbytes"]),  # how many GPUs there are is not known
        ("qlora", Stage.PREPARE, 0, ["triton"]),
        ("prompt", Stage.PREPARE, 4, ["bitsandbytes", "torch"]),
    ],
)
def test_a_job_leaves_out_what_it_has_no_use_for(
    method: str, stage: Stage, gpus: int | None, left_out: list[str]
) -> None:
    wire = {"model": {"path": "m"}, "datasets": [DATASET], "tuning": {"method": method}}
    assert unneeded(FineTuneJobSpec.model_validate(wire), stage, gpus) == left_out
    own_code = {"model": {"path": "m", "trustRemoteCode": True}}
    assert unneeded(FineTuneJobSpec.model_validate(wire | own_code), stage, gpus) == []


def test_what_is_left_out_is_as_if_it_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    leave_out(["this", "json"])
    assert importlib.util.find_spec("this") is None
    with pytest.raises(ModuleNotFoundError):
        import this  # noqa: F401
    assert sys.modules["json"] is not None, "what is imported already stays"
    assert "this" in left_out()
    bring_back("this")
    bring_back("json")
    assert importlib.util.find_spec("this") is not None
    assert "json" in sys.modules


def can_be_imported(names: list[str]) -> list[bool]:
    return [importlib.util.find_spec(name) is not None for name in names]


def test_processes_that_share_the_work_leave_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "this", None)
    with Workers(2) as workers:
        (found,) = workers.carry_out(can_be_imported, ["this", "json"], expected=PARALLEL_ROWS)
    assert found == [False, True]


def test_the_collector_works_as_ever_after_the_imports_but_leaves_them_alone() -> None:
    usual, before = gc.get_threshold(), gc.get_freeze_count()
    try:
        with few_walks():
            assert gc.get_threshold()[0] > usual[0]
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
