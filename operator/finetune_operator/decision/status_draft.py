"""The status that a decision drafts, and when the job has to be looked at again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import JobStatus, Phase
from finetune_operator.decision.conditions import JobCondition, State
from finetune_operator.decision.model import Observation


@dataclass
class StatusDraft:
    """A copy of the persisted status, changed in place by every step of a decision."""

    observation: Observation
    status: JobStatus
    requeue_at: datetime | None = None
    """The nearest moment at which the decision may change by itself."""

    @property
    def now(self) -> datetime:
        """The time of the observation."""
        return self.observation.now

    @property
    def spec(self) -> FineTuneJobSpec:
        """The spec of the observation."""
        return self.observation.spec

    @property
    def credentials(self) -> str:
        """State of the Secrets as the status remembers it; never empty, since empty means that nothing is awaited."""
        return f"={self.observation.credentials_version}"

    @property
    def requeue_after(self) -> float | None:
        """Seconds until `requeue_at`, at least one."""
        return None if self.requeue_at is None else max((self.requeue_at - self.now).total_seconds(), 1.0)

    def requeue_by(self, moment: datetime | None) -> None:
        """Have the job looked at again at a moment, unless it is earlier anyway."""
        if moment is not None:
            self.requeue_at = moment if self.requeue_at is None else min(moment, self.requeue_at)

    def stop_waiting(self) -> None:
        """Clear every reason for which the status waits."""
        self.status.retry_at, self.status.waiting_since, self.status.credentials_seen = None, None, ""

    def fail(self, reason: str, message: str) -> JobCondition:
        """End the job as failed."""
        self.status.completion_time = self.status.completion_time or self.now
        self.stop_waiting()
        return JobCondition(State.FAILED, reason, message, Phase.FAILED)
