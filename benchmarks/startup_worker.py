"""A Train process with a stop-watch on its parts. Nothing else differs from `python -m finetune_trainer train`."""

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


def run(out: Path) -> None:
    """Train until the first step has been reported."""
    parts = Parts()
    parts.seconds["interpreter"] = BEGUN - float(os.environ["BENCHMARK_STARTED"])
    parts.begin("import torch")
    import torch

    assert torch.get_num_threads()
    parts.end()
    parts.begin("import the trainer")
    from finetune_trainer import __main__ as program
    from finetune_trainer.train import processes, stage
    from finetune_trainer.train.checkpoint import Checkpoints
    from finetune_trainer.train.loop import Loop
    from finetune_trainer.train.monitor import Monitor

    parts.end()
    parts.watch(program, "context_from_environment", "run config")
    parts.watch(processes, "meet", "meeting")
    parts.watch(stage, "build_model", "loading the model")
    parts.watch(stage, "build_batchers", "data")
    parts.watch(stage, "build_loop", "the rest of building")
    parts.watch(Checkpoints, "save", "first checkpoint, held")
    parts.watch(Loop, "_begin", "largest micro-batch, tried")
    parts.watch(Loop, "run", "first step")

    def first(*_: Any, **__: Any) -> None:
        parts.end()  # Loop.run
        out.write_text(json.dumps(parts.seconds))
        os._exit(0)

    Monitor.step = first  # type: ignore[method-assign]
    program.main(["train"])


if __name__ == "__main__":
    run(Path(sys.argv[1]))
