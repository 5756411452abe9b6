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


Watched = list[tuple[Any, str, str]]
"""Object, its function, and the name of the part that this is."""


def parts_of_train() -> tuple[Watched, tuple[Any, str]]:
    """Parts of Train, and the function that its first step is reported to."""
    from finetune_trainer.train import processes, stage
    from finetune_trainer.train.checkpoint import Checkpoints
    from finetune_trainer.train.loop import Loop
    from finetune_trainer.train.monitor import Monitor

    watched: Watched = [
        (processes, "init_distributed", "meeting"),
        (stage, "build_model", "loading the model"),
        (stage, "_build_data", "data"),
        (stage, "build_loop", "the rest of building"),
        (Checkpoints, "save", "first checkpoint, held"),
        (Loop, "_begin", "largest micro-batch, tried"),
        (Loop, "run", "first step"),
    ]
    return watched, (Monitor, "step")


def parts_of_evaluate() -> tuple[Watched, tuple[Any, str]]:
    """Parts of Evaluate, and the function that is told of its first answers."""
    from transformers import AutoTokenizer

    from finetune_trainer.evaluate import models, stage

    watched: Watched = [
        (stage, "_digest_of_export", "digest of the export"),
        (stage, "_inputs", "data"),
        (AutoTokenizer, "from_pretrained", "tokenizer"),
        (models, "_load", "loading the model"),
        (models, "_tuned", "adding the adapter"),
        (stage, "_settings", "ways of scoring compared"),
        (stage, "answer_rows", "first rows answered"),
    ]
    return watched, (stage._RowProgress, "add")


PARTS_OF = {"train": parts_of_train, "evaluate": parts_of_evaluate}


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

    watched, result = PARTS_OF[stage]()
    parts.end()
    for part in watched:
        parts.watch(*part)
    setattr(*result, ended)
    from benchmarks.harness import peak_megabytes

    imported = peak_megabytes()
    parts.watch(program, "context_from_environment", "run config")
    program.main([stage])


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
