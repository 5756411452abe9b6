"""A stage's process with a stop-watch on its parts. Nothing else differs from `python -m finetune_trainer STAGE`."""

import os
import time

BEGUN = time.time()  # before anything is imported

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


class Parts:
    """Seconds by part; what a part calls that is itself a part is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[list[Any]] = []

    def begin(self, name: str) -> None:
        """A part begins; the one around it pauses."""
        self._open.append([name, time.perf_counter(), 0.0])

    def end(self) -> None:
        """The innermost part ends."""
        name, begun, inside = self._open.pop()
        passed = time.perf_counter() - begun
        self.seconds[name] = self.seconds.get(name, 0.0) + passed - inside
        if self._open:
            self._open[-1][2] += passed

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Count the time of `owner.function` as part `name`."""
        inner: Callable[..., Any] = getattr(owner, function)

        def watched(*args: Any, **named: Any) -> Any:
            self.begin(name)
            try:
                return inner(*args, **named)
            finally:
                self.end()

        setattr(owner, function, watched)


def watch_train(parts: Parts, ended: Callable[..., None]) -> None:
    """Parts of Train until its first step has been reported."""
    from finetune_trainer.train import processes, stage
    from finetune_trainer.train.checkpoint import Checkpoints
    from finetune_trainer.train.loop import Loop
    from finetune_trainer.train.monitor import Monitor

    parts.end()
    parts.watch(processes, "meet", "meeting")
    parts.watch(stage, "build_model", "loading the model")
    parts.watch(stage, "build_batchers", "data")
    parts.watch(stage, "build_loop", "the rest of building")
    parts.watch(Checkpoints, "save", "first checkpoint, held")
    parts.watch(Loop, "_begin", "largest micro-batch, tried")
    parts.watch(Loop, "run", "first step")
    Monitor.step = ended  # type: ignore[method-assign]


def watch_evaluate(parts: Parts, ended: Callable[..., None]) -> None:
    """Parts of Evaluate until its first rows have been answered."""
    from transformers import AutoTokenizer

    from finetune_trainer.evaluate import models, stage

    parts.end()
    parts.watch(stage, "_digest_of_export", "digest of the export")
    parts.watch(stage, "_asked", "data")
    parts.watch(AutoTokenizer, "from_pretrained", "tokenizer")
    parts.watch(models, "_load", "loading the model")
    parts.watch(models, "_tuned", "adding the adapter")
    parts.watch(stage, "_settings", "ways of scoring compared")
    parts.watch(stage, "answer_rows", "first rows answered")
    stage._RowProgress.add = ended  # type: ignore[method-assign]


WATCHES = {"train": watch_train, "evaluate": watch_evaluate}


def run(stage: str, out: Path) -> None:
    """Run the stage until its first result."""
    parts = Parts()
    parts.seconds["interpreter"] = BEGUN - float(os.environ["BENCHMARK_STARTED"])
    parts.begin("imports")
    from finetune_trainer import __main__ as program

    program.import_stage(program.context_from_environment(), stage)

    def ended(*_: Any, **__: Any) -> None:
        parts.end()  # the part that the first result is part of
        out.write_text(json.dumps({"seconds": parts.seconds, "importedMB": imported, "peakMB": peak_megabytes()}))
        os._exit(0)

    WATCHES[stage](parts, ended)
    from benchmarks.harness import peak_megabytes

    imported = peak_megabytes()
    parts.watch(program, "context_from_environment", "run config")
    program.main([stage])


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
