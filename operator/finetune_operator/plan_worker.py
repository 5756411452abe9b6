"""The memory plan in a process of its own: what a tenant or a model makes it take is bounded, and it can be killed.

The parent writes a line of JSON for each plan and reads one back; the process ends when nobody asks for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import first_problem
from finetune_operator.decision.model import PlanFailure
from finetune_operator.sizing.plan import plan_run

TIME_LIMIT_SECONDS = 30.0
"""For one plan, start of the process included; a plan takes milliseconds."""
MEMORY_LIMIT_BYTES = 1 << 30
"""Address space of the process, most of which is libraries."""
IDLE_SECONDS = 60.0
LONGEST_LINE_BYTES = 1 << 22


@dataclass
class PlanWorker:
    """Makes plans one after the other in a process that is started when needed."""

    command: Sequence[str] = (sys.executable, "-m", "finetune_operator.plan_worker")
    time_limit_seconds: float = TIME_LIMIT_SECONDS
    idle_seconds: float = IDLE_SECONDS
    _process: asyncio.subprocess.Process | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _idle: asyncio.TimerHandle | None = None

    async def plan(
        self, spec: FineTuneJobSpec, model: ModelFacts, lengths: LengthFacts, price_per_gpu_hour: float | None
    ) -> Plan | PlanFailure:
        """The plan of a run, or why there is none. Never raises for what is planned."""
        facts = {"spec": spec.to_wire(), "model": model.to_wire(), "lengths": lengths.to_wire()}
        line = json.dumps(facts | {"price": price_per_gpu_hour}).encode() + b"\n"
        async with self._lock:
            try:
                answer = await asyncio.wait_for(self._ask_again_once(line), self.time_limit_seconds)
            except TimeoutError:
                await self.close()
                return PlanFailure(f"the memory plan was not ready within {self.time_limit_seconds:.0f} s")
            except (OSError, ValueError):
                await self.close()
                return PlanFailure("the process that makes the memory plan ended twice")
            except asyncio.CancelledError:
                # Its answer would be taken for that of the next plan.
                self._kill()
                raise
            self._idle = asyncio.get_running_loop().call_later(self.idle_seconds, self._kill)
        return PlanFailure(answer["error"]) if "error" in answer else Plan.model_validate(answer["plan"])

    async def _ask_again_once(self, line: bytes) -> dict[str, Any]:
        """The answer; of a second process if the first dies, which may have been killed for what others did."""
        try:
            return await self._ask(line)
        except (OSError, ValueError):
            await self.close()
            return await self._ask(line)

    async def _ask(self, line: bytes) -> dict[str, Any]:
        if self._idle is not None:
            self._idle.cancel()
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *self.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE_BYTES
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        await self._process.stdin.drain()
        answer: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return answer

    def _kill(self) -> asyncio.subprocess.Process | None:
        """Forget the process and kill it; it is not asked again, even if its end is noticed later."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return process

    async def close(self) -> None:
        """End the process; the next plan starts another."""
        if self._idle is not None:
            self._idle.cancel()
        process = self._kill()
        if process is not None:
            await process.wait()


def main() -> None:
    """Answer each line of standard input with a line."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(facts: dict[str, Any]) -> dict[str, Any]:
    try:
        plan = plan_run(
            FineTuneJobSpec.model_validate(facts["spec"]),
            ModelFacts.model_validate(facts["model"]),
            LengthFacts.model_validate(facts["lengths"]),
            price_per_gpu_hour=facts["price"],
        )
        return {"plan": plan.to_wire()}
    except ValidationError as error:
        return {"error": f"the memory plan is out of bounds: {first_problem(error)}"}
    except MemoryError:
        return {"error": "the memory plan needs more memory than it may take"}
    except Exception as error:
        return {"error": f"the memory plan cannot be computed ({type(error).__name__}: {error})"}


if __name__ == "__main__":
    main()
