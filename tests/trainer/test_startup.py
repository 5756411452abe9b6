"""What a stage's process does not import, how it imports the rest, and what its libraries do not keep."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys

import pytest

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.prepare.workers import PARALLEL_ROWS, Workers
from finetune_trainer.startup import (
    ONEDNN_CACHE_ENTRIES,
    hidden_packages,
    hide_packages,
    limit_onednn_cache,
    reduced_gc,
    restore_package,
    unused_packages,
)

DATASET = {"name": "a", "path": "a.csv", "task": "classification"}


@pytest.mark.parametrize(
    ("method", "stage", "gpus", "unused"),
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
    method: str, stage: Stage, gpus: int | None, unused: list[str]
) -> None:
    wire = {"model": {"path": "m"}, "datasets": [DATASET], "tuning": {"method": method}}
    assert unused_packages(FineTuneJobSpec.model_validate(wire), stage, gpus) == unused
    own_code = {"model": {"path": "m", "trustRemoteCode": True}}
    assert unused_packages(FineTuneJobSpec.model_validate(wire | own_code), stage, gpus) == []


def test_what_is_left_out_is_as_if_it_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    hide_packages(["this", "json"])
    assert importlib.util.find_spec("this") is None
    with pytest.raises(ModuleNotFoundError):
        import this  # noqa: F401
    assert sys.modules["json"] is not None, "what is imported already stays"
    assert "this" in hidden_packages()
    restore_package("this")
    restore_package("json")
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
        with reduced_gc():
            assert gc.get_threshold()[0] > usual[0]
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


GROWTH = """
from finetune_trainer.startup import limit_onednn_cache
limit_onednn_cache()
import ctypes, torch

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Heap
weight = torch.ones(256, 256, dtype=torch.bfloat16)

def after(lengths):
    for length in lengths:
        torch.nn.functional.linear(torch.ones(length, 256, dtype=torch.bfloat16), weight)
    return libc.mallinfo2().uordblks

print(after(range(1, 201)), after(range(201, 501)))
"""


def test_rows_of_ever_new_lengths_do_not_take_ever_more_memory() -> None:
    """300 products with rows of lengths that were not there before took 190 MB for good."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    program = [sys.executable, "-c", GROWTH]
    said = subprocess.run(program, env=environment, check=True, capture_output=True, text=True).stdout
    before, after = map(int, said.split())
    assert after - before < 5_000_000


def test_what_the_environment_says_of_the_caches_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    limit_onednn_cache()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ["LRU_CACHE_CAPACITY"] == str(ONEDNN_CACHE_ENTRIES)
