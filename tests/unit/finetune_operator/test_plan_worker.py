"""The memory plan cannot hold up the operator: it runs elsewhere, within limits, and its failure is a sentence."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from tests.unit.finetune_operator.decision.world import LENGTHS, MODEL_FACTS, SPEC

from finetune_api.report import Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.decision.model import PlanFailure
from finetune_operator.plan_worker import PlanWorker
from finetune_operator.sizing.plan import plan_run

FACTS = MODEL_FACTS, LENGTHS


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


async def test_the_plan_is_that_of_this_process_and_comes_again_from_the_same_worker() -> None:
    worker, spec = PlanWorker(), FineTuneJobSpec.model_validate(SPEC)
    try:
        first = await worker.plan(spec, *FACTS, 2.0)
        process = worker._process
        assert first == plan_run(spec, *FACTS, price_per_gpu_hour=2.0)
        assert await worker.plan(spec, *FACTS, 2.0) == first
        assert worker._process is process
    finally:
        await worker.close()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import time; time.sleep(60)", "the memory plan was not ready within 1 s"),
        ("import os; os.kill(os.getpid(), 9)", "the process that makes the memory plan ended twice"),
        ("print('Traceback', flush=True)", "the process that makes the memory plan ended twice"),
        ('print(\'{"error": "it is too large"}\', flush=True)', "it is too large"),
    ],
)
async def test_a_worker_that_hangs_or_dies_is_a_sentence_and_the_next_plan_starts_another(
    code: str, sentence: str
) -> None:
    limit = 1.0 if "sleep" in code else 60.0
    worker, spec = PlanWorker(python(code), time_limit_seconds=limit), FineTuneJobSpec.model_validate(SPEC)
    assert await worker.plan(spec, *FACTS, None) == PlanFailure(sentence)
    await worker.close()
    worker.command, worker.time_limit_seconds = PlanWorker.command, 60.0
    assert isinstance(await worker.plan(spec, *FACTS, None), Plan)
    await worker.close()


async def test_a_worker_that_is_killed_once_is_started_again_with_the_same_question(tmp_path: Path) -> None:
    dies_once = f"""
import os, pathlib, runpy, sys
if not pathlib.Path({str(tmp_path / "died")!r}).exists():
    pathlib.Path({str(tmp_path / "died")!r}).touch()
    os.kill(os.getpid(), 9)
runpy.run_module("finetune_operator.plan_worker", run_name="__main__")
"""
    worker, spec = PlanWorker(python(dies_once)), FineTuneJobSpec.model_validate(SPEC)
    assert await worker.plan(spec, *FACTS, None) == plan_run(spec, *FACTS)
    await worker.close()


async def test_a_worker_that_nobody_asks_ends() -> None:
    worker = PlanWorker(idle_seconds=0.05)
    await worker.plan(FineTuneJobSpec.model_validate(SPEC), *FACTS, None)
    process = worker._process
    assert process is not None
    assert await process.wait() == -9
    await worker.close()


async def test_a_plan_after_one_that_was_cancelled_or_an_idle_end_is_its_own() -> None:
    worker, spec = PlanWorker(), FineTuneJobSpec.model_validate(SPEC)
    other = LENGTHS.model_copy(update={"documents": 5000})
    asked = asyncio.create_task(worker.plan(spec, *FACTS, None))
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert await worker.plan(spec, MODEL_FACTS, other, None) == plan_run(spec, MODEL_FACTS, other)
    worker._kill()
    assert await worker.plan(spec, *FACTS, None) == plan_run(spec, *FACTS)
    await worker.close()
