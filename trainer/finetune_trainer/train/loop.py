"""The training loop. All ranks take the same decisions: from the step's number, or from the step's all-reduce."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from finetune_api.report import FailureClass
from finetune_trainer.data.mixing import seed_of
from finetune_trainer.data.order import ExampleSampler
from finetune_trainer.failures import TrainerError
from finetune_trainer.model.build import CausalModel
from finetune_trainer.train.batches import MicroBatcher, RowAssignment
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.collective import StepFlags, StepReduction, StepResult
from finetune_trainer.train.interrupt import Interrupt, preempted
from finetune_trainer.train.monitor import Monitor
from finetune_trainer.train.objective import Objective
from finetune_trainer.train.optimizer import Optimizer
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.spikes import MOST_ROLLBACKS, Spike, observe
from finetune_trainer.train.state import TrainState
from finetune_trainer.train.validate import Validator
from finetune_trainer.train.watchdog import Watchdog


@dataclass(frozen=True)
class LoopSettings:
    """What the loop does when."""

    total: int
    """Number of steps."""
    seed: int
    rank: int
    validate_every: int
    """Steps between validations."""
    checkpoint_seconds: float
    """Seconds between checkpoints; 0 saves after every step."""
    hang_seconds: float
    """Time limit of one step, validation or save."""
    start_seconds: float
    """Time limit of the first micro-batch and step, which may compile."""
    keep_best: bool = True
    """End with the weights that had the best validation loss."""
    watched: Literal["loss", "accuracy"] = "loss"
    """Metric that early stopping watches."""
    patience: int | None = None
    """Validations without improvement after which training stops; None: never."""


@dataclass
class Loop:
    """One rank's part of training."""

    settings: LoopSettings
    model: CausalModel
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    sampler: ExampleSampler
    batcher: MicroBatcher
    validator: Validator | None
    checkpoints: Checkpoints
    reduction: StepReduction
    monitor: Monitor
    watchdog: Watchdog
    interrupt: Interrupt
    device: torch.device
    describe: Callable[[int], str] = str
    """Name of a training example for a user: dataset and row."""
    state: TrainState = field(default_factory=TrainState)
    clock: Callable[[], float] = time.monotonic
    _saved_at: float = 0.0
    _saved_step: int | None = None

    def run(self) -> int:
        """Train to the end. Returns the step whose weights the model holds then.

        Raises TrainerError: preempted (after a checkpoint), diverged, storage-full, fenced.
        """
        self._begin()
        while not self._ended:
            if self.state.step in self.state.skipped:
                self.state.step += 1
                continue
            self._optimise(self.state.step)
            self.state.step += 1
            results = self._settled()
            spike = self._observe(results)
            if spike is not None:
                self._roll_back(spike)
                continue
            better = self._validation_due and self._validate()
            stop, save, failed = (any(getattr(r.flags, flag) for r in results) for flag in ("stop", "save", "failed"))
            if failed:
                self.checkpoints.wait()  # raises the error of the save, on every rank
            if save or stop or (better and self.settings.keep_best):
                self._save()
            if stop:
                self._wait_for_checkpoint()
                raise preempted(f"after the checkpoint of step {self.state.step}")
        self._save()
        self._wait_for_checkpoint()
        return self._take_best()

    def _begin(self) -> None:
        """Run the largest micro-batch and discard it: memory runs out now or never. Then save the first checkpoint."""
        self.watchdog.expect("compiling and trying the largest micro-batch", self.settings.start_seconds)
        torch.manual_seed(self.settings.seed)
        batch = self.batcher.largest().to(self.device)
        self.model.sync_gradients(last=True)
        self.objective(self.model, batch).loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()
        self.interrupt.defer_signals()
        self._saved_at = self.clock()
        if self.state.step == 0:
            self._save()  # a spike in the first steps rolls back to it
        else:
            self._saved_step = self.state.step
        self.monitor.throughput.restart()

    # --- a step ---

    def _optimise(self, step: int) -> None:
        """Forward and backward passes over the step's examples, and the update."""
        first = self.monitor.throughput.seconds_per_step is None
        self.watchdog.expect("data", self.settings.start_seconds if first else self.settings.hang_seconds, step + 1)
        torch.manual_seed(seed_of("step", self.settings.seed, step, self.settings.rank))
        assignment = self.batcher.assign_rows(self.sampler.step(step))
        loss = self._accumulate(assignment)
        self.watchdog.mark("all-reduce")
        squared_norm, tokens = self.optimizer.squared_norm(), (assignment.tokens, assignment.computed_tokens)
        squared_norm = self.reduction.reduce(step, loss, squared_norm, self._flags(), *tokens)
        self.optimizer.step(self.schedule(step), squared_norm)
        self.optimizer.zero_grad()

    def _accumulate(self, assignment: RowAssignment) -> Tensor:
        """Add up the gradients of the step's loss; returns this rank's share of the loss, float32[]."""
        total = torch.zeros((), device=self.device)
        batches = list(self.batcher.batches(assignment))
        for number, batch in enumerate(batches, 1):
            self.watchdog.mark(f"micro-batch {number} of {len(batches)}")
            self.model.sync_gradients(last=number == len(batches))
            loss = self.objective(self.model, batch.to(self.device)).loss
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _flags(self) -> StepFlags:
        due = self.settings.rank == 0 and self.clock() - self._saved_at >= self.settings.checkpoint_seconds
        if due:
            self._saved_at = self.clock()
        return StepFlags(stop=self.interrupt.requested, save=due, failed=self.checkpoints.failed)

    # --- its result ---

    def _settled(self) -> list[StepResult]:
        """Results that are known by now; all of them before anything that needs the newest or is durable."""
        results = self.reduction.settled(all_of_them=self._validation_due or self._ended)
        if any(result.flags != StepFlags() for result in results):
            results += self.reduction.settled(all_of_them=True)
        return results

    def _observe(self, results: list[StepResult]) -> Spike | None:
        for result in results:
            self.monitor.step(result, self.schedule(result.step), self.sampler.epochs_done(result.step + 1))
            warm = result.step >= self.schedule.warmup_steps
            self.state.spikes, spike = observe(self.state.spikes, result.step, result.loss, result.grad_norm, warm)
            if spike is not None:
                return spike
        self.monitor.checkpoint(self.checkpoints.published)
        self.monitor.tracked()
        return None

    def _validate(self) -> bool:
        """Validate; returns whether the loss is the best so far."""
        assert self.validator is not None
        self.watchdog.expect("validating", self.settings.hang_seconds, self.state.step)
        validation = self.validator(self.model)
        watched = validation.loss if self.settings.watched == "loss" else -validation.accuracy
        better = self.state.record_validation(validation.loss, watched, self.settings.patience)
        self.monitor.validation(self.state.step, validation, better)
        return better

    def _roll_back(self, spike: Spike) -> None:
        """Restore the newest checkpoint from before the spike's window, whose steps are skipped from now on."""
        self.watchdog.expect("rolling back", 2 * self.settings.hang_seconds)
        self.reduction.settled(all_of_them=True)
        skipped = {*self.state.skipped, *range(spike.first, spike.last + 1)}
        rollbacks = self.state.rollbacks + 1
        self.checkpoints.wait()
        found = self.checkpoints.newest(at_most=spike.first) if rollbacks <= MOST_ROLLBACKS else None
        if found is None:
            raise self._diverged(spike)
        self.checkpoints.drop_after(found.manifest.step)
        self.checkpoints.restore(found, self.optimizer.tensors())
        self.state = found.manifest.state.model_copy(
            update={"skipped": sorted(skipped), "rollbacks": rollbacks}, deep=True
        )
        self._saved_step, self._saved_at = None, -math.inf  # makes the skip list durable after the next step
        self.monitor.rolled_back(spike, self.state.step)

    def _diverged(self, spike: Spike) -> TrainerError:
        examples = self.sampler.step(spike.last)
        shown = ", ".join(self.describe(int(example)) for example in examples[:8])
        return TrainerError(
            FailureClass.DIVERGED,
            f"Training diverged ({spike.sentence}) after {self.state.rollbacks} rollbacks. Lower "
            f"training.learningRate or training.maxGradNorm, or check the examples of step {spike.last + 1}: {shown}.",
            "training.learningRate",
        )

    # --- checkpoints ---

    def _save(self) -> None:
        if self._saved_step != self.state.step:
            self.watchdog.expect("saving a checkpoint", self.settings.hang_seconds, self.state.step)
            self.checkpoints.save(self.optimizer.tensors(), self.state)
            self._saved_step, self._saved_at = self.state.step, self.clock()

    def _wait_for_checkpoint(self) -> None:
        self.watchdog.expect("saving a checkpoint", self.settings.hang_seconds, self.state.step)
        self.checkpoints.wait()
        self.monitor.checkpoint(self.checkpoints.published)

    def _take_best(self) -> int:
        """Put the best weights into the model, if wanted; returns the step that it holds."""
        best = self.state.best
        if not self.settings.keep_best or best is None or best.step == self.state.step:
            return self.state.step
        found = self.checkpoints.at(best.step)
        if found is None:
            self.monitor.reporter.warn(f"The best checkpoint, step {best.step}, is damaged; exporting the last one.")
            return self.state.step
        self.checkpoints.restore(found, self.optimizer.tensors())
        return best.step

    # --- the calendar ---

    @property
    def _ended(self) -> bool:
        return self.state.step >= self.settings.total or self.state.stopped_early

    @property
    def _validation_due(self) -> bool:
        due = self.state.step % self.settings.validate_every == 0 or self.state.step == self.settings.total
        return due and self.validator is not None
