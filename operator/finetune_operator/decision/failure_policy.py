"""What follows from each way an attempt can fail: one table, shown to users in docs/failure-policy.md.

Nothing here looks at pods (root_cause.py does) or at the clock.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from finetune_api.base import STAGES, Stage
from finetune_api.report import FailureClass


class Disturbance(StrEnum):
    """Ends of an attempt that no rank reports: the operator sees them."""

    EVICTED = "evicted"
    NODE_LOST = "node-lost"
    DELETED = "deleted"
    PARTIAL_GANG = "partial-gang"
    NO_REPORT = "no-report"
    SUSPENDED = "suspended"
    DEADLINE = "deadline-exceeded"


class Then(StrEnum):
    """What happens after a failure."""

    FAIL = "fail"
    RETRY = "retry"
    SHRINK = "shrink"


@dataclass(frozen=True)
class Policy:
    """One row of the table."""

    then: Then
    counted: bool
    because: str
    """What is done, and why, for the reader of the table."""
    waits_after_train: bool = False
    """Only the user can help; once a model has been trained the job waits for that instead of failing."""


def _fail(because: str, waits: bool = False) -> Policy:
    return Policy(Then.FAIL, False, because, waits)


POLICIES: dict[FailureClass | Disturbance, Policy] = {
    FailureClass.BAD_SPEC: _fail("Fails at once: the sentence names the field to change.", waits=True),
    FailureClass.BAD_DATA: _fail("Fails at once: the sentence names dataset, file and row.", waits=True),
    FailureClass.NO_ACCESS: _fail(
        "Fails at once: the sentence names the page to visit or the token to give.", waits=True
    ),
    FailureClass.DOES_NOT_FIT: _fail("Fails at once: the sentence names three ways to make it fit."),
    FailureClass.STORAGE_FULL: _fail("Fails at once: enlarge the claim, then retry; checkpoints are kept.", waits=True),
    FailureClass.DIVERGED: _fail("Fails at once: two roll-backs did not help; the sentence names the examples."),
    FailureClass.GATE_REFUSED: _fail("Fails with reason GateRefused: the model stays on the volume, unpublished."),
    FailureClass.CONFIG_CHANGED: _fail("Fails at once: a checkpoint of another configuration is never gone on from."),
    FailureClass.CUDA_OOM: Policy(
        Then.SHRINK,
        True,
        "Half the micro-batch tokens, never below the longest document; then activation checkpointing; then it does "
        "not fit. The global batch stays the same.",
    ),
    FailureClass.HOST_OOM: Policy(Then.RETRY, True, "Retried with backoff; the sentence names the limit to raise."),
    FailureClass.CRASH: Policy(Then.RETRY, True, "Retried with backoff from the newest valid checkpoint."),
    FailureClass.HANG: Policy(Then.RETRY, True, "Retried with backoff; the stacks of all ranks are on the volume."),
    FailureClass.FENCED: Policy(Then.RETRY, True, "Retried with backoff: another attempt held the volume."),
    FailureClass.PEER: Policy(Then.RETRY, True, "Retried as a crash: every rank blames another one."),
    FailureClass.PREEMPTED: Policy(Then.RETRY, False, "Retried from the checkpoint that was made on the way out."),
    FailureClass.HUB_UNAVAILABLE: Policy(Then.RETRY, False, "Retried with backoff until the Hub answers again."),
    Disturbance.EVICTED: Policy(Then.RETRY, False, "Retried: the cluster took the node back."),
    Disturbance.NODE_LOST: Policy(
        Then.RETRY, False, "Retried once the lost pods are gone or their node is out of service."
    ),
    Disturbance.DELETED: Policy(Then.RETRY, False, "Retried: someone deleted a pod or the child."),
    Disturbance.PARTIAL_GANG: Policy(
        Then.RETRY, False, "Retried: not all pods ran within timeouts.startup of the first."
    ),
    Disturbance.NO_REPORT: Policy(Then.RETRY, True, "Retried: the pods succeeded, but no report of it arrived."),
    Disturbance.SUSPENDED: Policy(Then.RETRY, False, "Goes on with the next attempt when suspend is set to false."),
    Disturbance.DEADLINE: _fail("Fails: the job has run for timeouts.activeDeadlineSeconds."),
}
"""Every class and disturbance has a row; a test holds this and the page in docs together."""


def policy_for(reason: str) -> Policy:
    """The row of a class or disturbance; an unknown word (a newer trainer's) is a crash."""
    for known, policy in POLICIES.items():
        if known == reason:
            return policy
    return POLICIES[FailureClass.CRASH]


def waits_for_user(reason: str, stage: Stage, local: bool) -> bool:
    """Whether the job waits for its user instead of failing: after Train, where somebody may come by later."""
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
    """What an out-of-memory may lower: tokens a packed row at most, and whether activations are recomputed."""

    micro_batch_tokens: int | None
    activation_checkpointing: bool


def shrink(now: Footprint, longest: int | None, can_checkpoint: bool) -> Footprint | None:
    """The next smaller footprint after a CUDA out-of-memory, or None if there is none: it does not fit.

    `longest` is the longest document in tokens, below which a row cannot go; None while unknown.
    """
    floor = max(longest or 1, 1)
    tokens = now.micro_batch_tokens
    if tokens is not None and tokens > floor:
        return Footprint(max(tokens // 2, floor), now.activation_checkpointing)
    if can_checkpoint and not now.activation_checkpointing:
        return Footprint(tokens, True)
    return None


def camel(reason: str) -> str:
    """A class as a condition's reason: `cuda-oom` → `CudaOom`."""
    return "".join(word.capitalize() for word in reason.replace("_", "-").split("-")) or "Unknown"


def markdown() -> str:
    """The table as the page docs/failure-policy.md shows it."""
    rows = [
        f"| `{reason}` | {_then(policy)} | {'yes' if policy.counted else 'no'} | {policy.because} |"
        for reason, policy in POLICIES.items()
    ]
    return "\n".join(["| class | what follows | counted | why |", "|---|---|---|---|", *rows, ""])


def _then(policy: Policy) -> str:
    words = {Then.FAIL: "failed", Then.RETRY: "next attempt", Then.SHRINK: "next attempt, smaller"}[policy.then]
    return words + (" (after Train: waits)" if policy.waits_after_train else "")
