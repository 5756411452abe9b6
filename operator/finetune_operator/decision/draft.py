"""The status in the making, and the ends that every part of a decision may come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from finetune_api.base import Stage
from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import JobStatus, Phase
from finetune_operator.decision.conditions import State, Verdict
from finetune_operator.decision.model import Observation

Planner = Callable[[FineTuneJobSpec, ModelFacts, LengthFacts], Plan]
"""Makes the memory plan from what Prepare found (sizing/memory.py)."""

RUNNING: dict[Stage, tuple[str, Phase]] = {
    Stage.PREPARE: ("Preparing", Phase.PREPARING),
    Stage.TRAIN: ("Training", Phase.TRAINING),
    Stage.EVALUATE: ("Evaluating", Phase.EVALUATING),
    Stage.PUBLISH: ("Publishing", Phase.PUBLISHING),
}

WAITING_FOR = {
    "Secret": "WaitingForSecret",
    "PersistentVolumeClaim": "WaitingForClaim",
    "Webhook": "WaitingForWebhook",
    "Quota": "WaitingForQuota",
    "Leftover": "WaitingForOlderJob",
    "Refused": "WaitingForApiServer",
}


@dataclass
class Draft:
    """The status being made, and when to look again."""

    seen: Observation
    status: JobStatus
    planner: Planner | None
    wakes: list[datetime] = field(default_factory=list)

    @property
    def now(self) -> datetime:
        return self.seen.now

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.seen.spec

    def wake_at(self, moment: datetime | None) -> None:
        if moment is not None:
            self.wakes.append(moment)


def fail(draft: Draft, reason: str, sentence: str) -> Verdict:
    status = draft.status
    status.completion_time = status.completion_time or draft.now
    status.retry_at, status.waiting_since, status.credentials_seen = None, None, ""
    return Verdict(State.FAILED, reason, sentence, Phase.FAILED)


def starting(stage: Stage) -> Verdict:
    _, phase = RUNNING[stage]
    return Verdict(State.PROGRESSING, "Starting", f"Starts {stage}.", phase)


def deadline_sentence(spec: FineTuneJobSpec) -> str:
    return f"The job has run for {spec.timeouts.active_deadline_seconds} s (timeouts.activeDeadlineSeconds)."


def credentials(seen: Observation) -> str:
    """State of the Secrets as it is remembered; never empty, for empty means that nobody waits."""
    return f"={seen.credentials_version}"
