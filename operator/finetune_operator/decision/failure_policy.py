"""What follows from each way an attempt can fail: one table, shown in docs/failure-policy.md (a test compares).

Nothing here looks at pods (root_cause.py does) or at the clock.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from finetune_api.base import STAGES, Stage
from finetune_api.report import FailureClass


class InfraFailure(StrEnum):
    """Why an attempt ended, where no rank reports it: the operator observes these."""

    EVICTED = "evicted"
    OVER_LIMIT = "over-limit"
    NOT_ADMITTED = "not-admitted"
    NODE_LOST = "node-lost"
    DELETED = "deleted"
    PARTIAL_GANG = "partial-gang"
    NO_REPORT = "no-report"
    SUSPENDED = "suspended"
    DEADLINE = "deadline-exceeded"


class FailureAction(StrEnum):
    """What happens after a failure."""

    FAIL = "fail"
    RETRY = "retry"
    SHRINK = "shrink"


@dataclass(frozen=True)
class Policy:
    """One row of the table."""

    action: FailureAction
    counted: bool
    explanation: str
    """What is done, and why, for readers of the table."""
    waits_after_train: bool = False
    """Only the user can help; once a model has been trained the job waits for that instead of failing."""


def _fail(explanation: str, waits: bool = False) -> Policy:
    return Policy(FailureAction.FAIL, False, explanation, waits)


def _retry(explanation: str, counted: bool = True) -> Policy:
    return Policy(FailureAction.RETRY, counted, explanation)


POLICIES: dict[str, Policy] = {
    FailureClass.BAD_SPEC: _fail("The message names the field to change.", waits=True),
    FailureClass.BAD_DATA: _fail("The message names the dataset, file and row.", waits=True),
    FailureClass.NO_ACCESS: _fail("The message names the page to visit or the token to provide.", waits=True),
    FailureClass.DOES_NOT_FIT: _fail("The message names three ways to make it fit."),
    FailureClass.STORAGE_FULL: _fail("Enlarge the claim, then retry; checkpoints are kept.", waits=True),
    FailureClass.DIVERGED: _fail("Two rollbacks did not help; the message names the examples."),
    FailureClass.EXPORT_DIFFERS: _fail("The message gives both losses; checkpoints are kept, nothing is published."),
    FailureClass.GATE_REFUSED: _fail("Fails with reason GateRefused; the model stays on the volume, unpublished."),
    FailureClass.CONFIG_CHANGED: _fail("A checkpoint of a different configuration is never resumed."),
    FailureClass.CUDA_OOM: Policy(
        FailureAction.SHRINK,
        True,
        "Halves the micro-batch tokens, never below the longest document; then turns on activation checkpointing; "
        "then fails as `does-not-fit`. The global batch size stays the same.",
    ),
    FailureClass.HOST_OOM: _retry("The message names the memory limit to raise."),
    FailureClass.CRASH: _retry("Resumes from the newest valid checkpoint."),
    FailureClass.HANG: _retry("The stacks of all ranks are on the volume."),
    FailureClass.FENCED: _retry("Another attempt held the volume."),
    FailureClass.PEER: _retry("Every rank reported a failure of another rank; treated as a crash."),
    FailureClass.PREEMPTED: _retry("Resumes from the checkpoint saved before the preemption.", counted=False),
    FailureClass.HUB_UNAVAILABLE: _retry("Retries until the Hub is available again.", counted=False),
    InfraFailure.EVICTED: _retry("The cluster evicted a pod. Resumes from the newest valid checkpoint.", counted=False),
    InfraFailure.OVER_LIMIT: _retry("The kubelet evicted a pod that exceeded its own limit; the message names it."),
    InfraFailure.NOT_ADMITTED: _retry("A kubelet refused a pod before anything ran in it.", counted=False),
    InfraFailure.NODE_LOST: _retry(
        "Starts once the lost pods are gone or their node is marked out of service.", counted=False
    ),
    InfraFailure.DELETED: _retry("Someone deleted a pod or the Job of the attempt.", counted=False),
    InfraFailure.PARTIAL_GANG: _retry("Not all pods started within timeouts.startup of the first.", counted=False),
    InfraFailure.NO_REPORT: _retry("The pods succeeded, but their final report is missing or incomplete."),
    InfraFailure.SUSPENDED: _retry("Resumes with the next attempt when spec.suspend is set to false.", counted=False),
    InfraFailure.DEADLINE: _fail("The job has run for timeouts.activeDeadlineSeconds."),
}


def policy_for(reason: str) -> Policy:
    """The row of a class; an unknown one (of a newer trainer) counts as a crash."""
    return POLICIES.get(reason, POLICIES[FailureClass.CRASH])


def waits_for_user(reason: str, stage: Stage, local: bool) -> bool:
    """Whether the job waits for its user instead of failing: after Train, since a model exists by then."""
    after_train = STAGES.index(stage) > STAGES.index(Stage.TRAIN)
    return after_train and not local and policy_for(reason).waits_after_train


def backoff_seconds(identity: str, failures: int, base_seconds: float, cap_seconds: float) -> float:
    """Seconds before the next attempt: exponential in the failures in a row (1 for the first), with jitter.

    The jitter, a factor in [0.5, 1.5), is a hash of `identity` (uid, stage and attempt): deciding twice gives
    the same moment, and a thousand jobs do not come back at once.
    """
    word = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4])
    jitter = 0.5 + word / 2**32
    exponent = min(max(failures, 1) - 1, 32)
    return min(base_seconds * 2.0**exponent, cap_seconds) * jitter


@dataclass(frozen=True)
class Footprint:
    """What an out-of-memory failure changes: the limit of tokens per micro-batch, and activation checkpointing."""

    micro_batch_tokens: int | None
    activation_checkpointing: bool


def shrink(footprint: Footprint, longest: int | None, can_checkpoint: bool) -> Footprint | None:
    """The next smaller footprint after a CUDA out-of-memory failure; None if there is none and training does not fit.

    `longest` is the longest document in tokens, the least that a micro-batch must hold; None while unknown.
    """
    floor = max(longest or 1, 1)
    tokens = footprint.micro_batch_tokens
    if tokens is not None and tokens > floor:
        return Footprint(max(tokens // 2, floor), footprint.activation_checkpointing)
    if can_checkpoint and not footprint.activation_checkpointing:
        return Footprint(tokens, True)
    return None


def condition_reason(reason: str) -> str:
    """A class as a condition's reason: `cuda-oom` → `CudaOom`."""
    return "".join(word.capitalize() for word in reason.replace("_", "-").split("-")) or "Unknown"
