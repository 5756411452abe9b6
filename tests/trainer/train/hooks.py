"""What can go wrong in a rank, arranged before it trains. Picklable: functools.partial of these functions."""

from __future__ import annotations

import builtins
import errno
import os
import signal
from pathlib import Path
from typing import Any


def at_step(step: int, act: str, ranks: tuple[int, ...] = (0,)) -> None:
    """Send this process a signal (`SIGKILL`, `SIGTERM`, `SIGSTOP`) when it begins a step, counted from 0."""
    from finetune_trainer.train.loop import Loop

    optimise = Loop._optimise

    def interrupted(self: Any, at: int) -> None:
        if at == step and self.settings.rank in ranks:
            os.kill(os.getpid(), signal.Signals[act])
        optimise(self, at)

    Loop._optimise = interrupted  # type: ignore[method-assign]


def divisions_counted(file: Path) -> None:
    """Write a line to a file whenever examples are divided into rows."""
    from finetune_trainer.train import batches

    pack = batches.pack

    def counted(*arguments: Any) -> Any:
        with file.open("a") as lines:
            lines.write("divided\n")
        return pack(*arguments)

    batches.pack = counted


def poisoned(steps: tuple[int, ...], factor: float, rank: int) -> None:
    """Multiply the loss of one rank by `factor` (nan, inf) in these steps."""
    from finetune_trainer.train.loop import Loop

    accumulate = Loop._accumulate

    def poison(self: Any, assignment: Any) -> Any:
        loss = accumulate(self, assignment)
        if self.state.step in steps and self.settings.rank == rank:
            for parameter in self.optimizer.parameters.values():
                parameter.grad.mul_(factor)
            loss = loss * factor
        return loss

    Loop._accumulate = poison  # type: ignore[method-assign]


def loss_jumps(steps: tuple[int, ...]) -> None:
    """Report a tenfold loss in these steps, as if training had gone wrong."""
    from finetune_trainer.train.loop import Loop

    accumulate = Loop._accumulate

    def jump(self: Any, assignment: Any) -> Any:
        return accumulate(self, assignment) * (10 if self.state.step in steps else 1)

    Loop._accumulate = jump  # type: ignore[method-assign]


def disk_full(part: str, from_step: int) -> None:
    """No space is left when a file whose path contains `part` is opened for writing, in saves from a step on."""
    opened, path_open = builtins.open, Path.open

    def full(path: object, mode: str) -> bool:
        name = str(path)
        step = name.split("step-")[-1][:8]
        return part in name and "w" in mode and step.isdigit() and int(step) >= from_step

    def fails(path: object) -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def checked_open(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if full(path, mode):
            raise fails(path)
        return opened(path, mode, *arguments, **named)

    def checked_path_open(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if full(self, mode):
            raise fails(self)
        return path_open(self, mode, *arguments, **named)

    builtins.open = checked_open  # type: ignore[assignment]
    Path.open = checked_path_open  # type: ignore[method-assign, assignment]


def out_of_memory() -> None:
    """The GPU's memory runs out in the first forward pass."""
    import torch

    from finetune_trainer.model.build import CausalModel

    def forward(self: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    CausalModel.forward = forward  # type: ignore[method-assign, assignment]


def fence_taken_at(step: int, fence: str) -> None:
    """Another attempt takes the volume when a step begins."""
    from finetune_trainer.train.loop import Loop

    optimise = Loop._optimise

    def taken(self: Any, at: int) -> None:
        if at == step:
            Path(fence).write_text('{"attempt": "uid-1/train/99"}')
        optimise(self, at)

    Loop._optimise = taken  # type: ignore[method-assign]


def lag(steps: int) -> None:
    """Read results so many steps late, as on a GPU."""
    from finetune_trainer.train import stage
    from finetune_trainer.train.collective import StepReduction

    stage.StepReduction = lambda device, lag: StepReduction(device, steps)  # type: ignore[misc, assignment]


def losses_only() -> None:
    """Skip checkpoints and the export, which take longer than a few steps of a large model."""
    from finetune_trainer.train.loop import Loop

    run = Loop.run

    def ended(self: Any) -> int:
        run(self)
        os._exit(0)

    Loop._save = Loop._wait_for_checkpoint = lambda self: None  # type: ignore[method-assign]
    Loop._take_best = lambda self: self.state.step  # type: ignore[method-assign]
    Loop.run = ended  # type: ignore[method-assign]
