"""What a run reports while it trains: curves on the volume, the report, W&B. Only rank 0 writes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from finetune_api.report import CheckpointRef, MetricValue, Progress
from finetune_trainer.reporter import Reporter
from finetune_trainer.train.collective import StepResult
from finetune_trainer.train.metrics import MetricsFile, Throughput
from finetune_trainer.train.spikes import Spike
from finetune_trainer.train.tracking import NoTracker, Tracker, evaluation_of
from finetune_trainer.train.validate import Validation


@dataclass
class Monitor:
    """Passes the loop's results on."""

    reporter: Reporter
    metrics: MetricsFile | None
    """None on all ranks but 0."""
    attempt: int
    total: int
    tracker: Tracker = field(default_factory=NoTracker)
    throughput: Throughput = field(default_factory=Throughput)
    _validation: MetricValue | None = None
    _checkpoint: CheckpointRef | None = None

    def step(self, result: StepResult, learning_rate: float, epoch: float) -> None:
        """Record a finished step; `epoch` is the number of passes over the data so far."""
        tokens, computed = result.tokens, result.computed_tokens
        self.throughput.step(tokens, computed)
        speed, pace = self.throughput.tokens_per_second, self.throughput.seconds_per_step
        computing = self.throughput.computed_tokens_per_second
        done = result.step + 1
        loss, norm = _finite(result.loss), _finite(result.grad_norm)
        self._row(
            step=done,
            epoch=round(epoch, 6),
            loss=loss,
            learningRate=learning_rate,
            gradNorm=norm,
            tokens=tokens,
            tokensPerSecond=speed and round(speed, 1),
            computedTokens=computed,
            computedTokensPerSecond=computing and round(computing, 1),
            time=round(time.time(), 3),
            attempt=self.attempt,
        )
        self.reporter.progress(
            Progress(
                step=done,
                total=self.total,
                epoch=round(epoch, 4),
                tokens_per_second=speed,
                computed_tokens_per_second=computing if computed < tokens else None,
                eta_seconds=None if pace is None else round(pace * (self.total - done)),
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=norm,
                validation=self._validation,
            )
        )
        curves = {"train/loss": loss, "train/learning_rate": learning_rate, "train/grad_norm": norm}
        curves |= {"train/epoch": epoch, "train/tokens_per_second": speed}
        curves |= {"train/computed_tokens_per_second": computing} if computed < tokens else {}
        self.tracker.log({key: value for key, value in curves.items() if value is not None}, done)
        if not result.finite:
            self.reporter.warn(f"Step {done} was skipped: its gradients are not finite.")

    def validation(self, step: int, validation: Validation, better: bool) -> None:
        """The model was validated after `step` steps."""
        values = {"loss": validation.loss, "accuracy": validation.accuracy}
        datasets = {
            name: {"documents": seen.documents, "loss": _finite(seen.loss), "accuracy": seen.accuracy}
            for name, seen in validation.datasets.items()
        }
        told = {key: _finite(value) for key, value in values.items()}
        self._row(step=step, validation={**told, "datasets": datasets}, best=better)
        if math.isfinite(validation.loss):
            self._validation = MetricValue(metric="loss", value=validation.loss, step=step)
            progress = self.reporter.report.progress.model_copy(update={"validation": self._validation})
            self.reporter.update(progress=progress)
        for name, seen in validation.datasets.items():
            values |= {f"{name}/loss": seen.loss, f"{name}/accuracy": seen.accuracy}
        self.tracker.log({f"validation/{key}": value for key, value in values.items()}, step)
        self.throughput.restart()

    def rolled_back(self, spike: Spike, step: int) -> None:
        """Training continues from the checkpoint of `step`, without the steps of the spike."""
        if self.metrics is not None:
            self.metrics.rewind(step)
        skipped = f"steps {spike.first + 1} to {spike.last + 1} are skipped"
        self.reporter.warn(
            f"The loss spiked ({spike.sentence}): rolled back to the checkpoint of step {step}; {skipped}."
        )
        self.throughput.restart()

    def checkpoint(self, published: CheckpointRef | None) -> None:
        """Report the newest published checkpoint, unless it was reported before."""
        if published is not None and published != self._checkpoint:
            self._checkpoint = published
            self.reporter.update(last_checkpoint=published)

    def tracked(self) -> None:
        """Report the tracker's page, or its problem."""
        if self.tracker.url and not self.reporter.report.wandb_url:
            self.reporter.update(wandb_url=self.tracker.url)
        if self.tracker.problem:
            self.reporter.warn(self.tracker.problem)

    def end(self, step: int) -> None:
        """Training has ended, and the weights of `step` were exported."""
        rows = self.metrics.rows() if self.metrics is not None else []
        self.tracker.finish(evaluation_of(rows, step))
        self.tracked()

    def _row(self, **values: object) -> None:
        if self.metrics is not None:
            self.metrics.write(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
