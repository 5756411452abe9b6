"""Why an attempt ended, by its pods and its report: the first failure that was not caused by another rank's."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from finetune_api.report import EXIT_CODES, Failure, FailureClass, Report
from finetune_operator.decision.failure_policy import InfraFailure
from finetune_operator.decision.model import Child, Pod, PodPhase

VAGUE = frozenset({FailureClass.CRASH, FailureClass.HANG, FailureClass.PREEMPTED, FailureClass.PEER})
"""Classes that a lost node or an eviction explains better; the others explain themselves."""

_CLASS_OF_EXIT_CODE = {code: kind for kind, code in EXIT_CODES.items() if kind is not FailureClass.CRASH}
_LIMIT = "podTemplate.resources.limits.memory (of Prepare and Publish: podTemplate.cpuResources.limits.memory)"
_SIGTERM_EXIT = 128 + signal.SIGTERM
_SIGKILL_EXIT = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Cause:
    """Root cause: its class, a sentence, and the rank that reported it; None if no rank did."""

    reason: FailureClass | InfraFailure
    sentence: str
    rank: int | None = None


def failures(child: Child, report: Report | None) -> list[Failure]:
    """All failures that ranks wrote, earliest first."""
    written = [pod.failure for pod in child.pods if pod.failure is not None]
    if report is not None and report.failure is not None:
        written.append(report.failure)
    return sorted(written, key=lambda failure: (failure.time, failure.rank if failure.rank is not None else 1 << 30))


def named_at(child: Child, report: Report | None) -> datetime | None:
    """When a rank first reported a failure that was not caused by another rank's, if one did."""
    causes = (f.time for f in failures(child, report) if f.failure_class is not FailureClass.PEER)
    return next(causes, None)


def find(child: Child, report: Report | None) -> Cause:
    """The root cause of a failed attempt."""
    cause = _earliest(child, report)
    limit = next((pod.memory_limit for pod in child.pods if pod.memory_limit), "")
    if cause.reason is FailureClass.HOST_OOM and limit and limit not in cause.sentence:
        # A rank does not know how its limit was written; all pods of an attempt have the same.
        return replace(cause, sentence=f"{cause.sentence} The current limit is {limit}.")
    return cause


def _earliest(child: Child, report: Report | None) -> Cause:
    written = [failure for failure in failures(child, report) if failure.failure_class is not FailureClass.PEER]
    definite = next((failure for failure in written if failure.failure_class not in VAGUE), None)
    if definite is not None:
        return _cause(definite)
    infra_failure = _infra_failure(child)
    if infra_failure is not None:
        return infra_failure
    silent = _silent(child.pods)
    candidates = [(failure.time, _cause(failure)) for failure in written]
    candidates += [(when, cause) for when, cause in silent if when is not None]
    if candidates:
        return min(candidates, key=lambda candidate: candidate[0])[1]
    if silent:
        return silent[0][1]
    return _without_evidence(child, report)


def _cause(failure: Failure) -> Cause:
    where = f" ({failure.field})" if failure.field and failure.field not in failure.sentence else ""
    return Cause(failure.failure_class, failure.sentence + where, failure.rank)


def _infra_failure(child: Child) -> Cause | None:
    for pod in child.pods:
        if pod.node_lost or pod.out_of_service:
            state = "is out of service" if pod.out_of_service else "is lost"
            return Cause(InfraFailure.NODE_LOST, f"Node {pod.node or 'unknown'} of pod {pod.name} {state}.")
    for pod in child.pods:
        said = f"{_quoted(pod)}." if pod.message else " by the cluster."
        if pod.over_own_limit:
            raise_it = "Raise that limit (podTemplate.resources.limits, or what the namespace's LimitRange sets)."
            return Cause(InfraFailure.OVER_LIMIT, f"Pod {pod.name} was evicted{said} {raise_it}")
        if pod.evicted:
            return Cause(InfraFailure.EVICTED, f"Pod {pod.name} was evicted or preempted{said}")
        if pod.refused:
            return Cause(InfraFailure.NOT_ADMITTED, f"The kubelet of node {pod.node} refused pod {pod.name}{said}")
    return None


def _silent(pods: Iterable[Pod]) -> list[tuple[datetime | None, Cause]]:
    """Pods that failed without an error report: what their exit code says, with its time."""
    silent = [pod for pod in pods if pod.failure is None and (pod.phase is PodPhase.FAILED or pod.oom_killed)]
    return [(pod.finished, cause) for pod in silent if (cause := _from_exit(pod)) is not None]


def _from_exit(pod: Pod) -> Cause | None:
    """What a pod's exit says; None if it only follows the failure of another rank."""
    code = pod.exit_code
    kind = _CLASS_OF_EXIT_CODE.get(code) if code is not None else None
    reason: FailureClass | InfraFailure = kind or FailureClass.CRASH
    if kind is FailureClass.PEER:
        return None
    if pod.oom_killed or kind is FailureClass.HOST_OOM:
        reason, limit = FailureClass.HOST_OOM, f" of {pod.memory_limit}" if pod.memory_limit else ""
        what = f"reached its memory limit{limit} (host memory, not GPU memory): raise {_LIMIT}."
    elif kind is not None:
        what = f"exited with code {code} ({kind}) without an error report."
    elif code == _SIGTERM_EXIT or (code == _SIGKILL_EXIT and pod.terminating):
        reason, what = InfraFailure.DELETED, "was terminated from outside the job."
    elif code == _SIGKILL_EXIT:
        limit = f" ({pod.memory_limit})" if pod.memory_limit else ""
        what = f"was killed (SIGKILL). If the node ran out of memory, raise {_LIMIT}{limit}."
    else:
        what = f"{_exit_text(code)} without an error report{_quoted(pod)}."
    return Cause(reason, f"Pod {pod.name} {what}")


def _quoted(pod: Pod) -> str:
    return f": {pod.message.strip().rstrip('.')}" if pod.message else ""


def _exit_text(code: int | None) -> str:
    if code is None:
        return "failed"
    if code > 128:
        names = {int(number): number.name for number in signal.Signals}
        return f"was ended by {names.get(code - 128, f'signal {code - 128}')} (exit code {code})"
    return f"exited with code {code}"


def _without_evidence(child: Child, report: Report | None) -> Cause:
    echoes = [failure for failure in failures(child, report) if failure.failure_class is FailureClass.PEER]
    if child.deleting or not child.exists:
        return Cause(InfraFailure.DELETED, "The attempt was deleted from outside the job.")
    terminating = next((pod for pod in child.pods if pod.terminating), None)
    if terminating is not None:
        return Cause(InfraFailure.DELETED, f"Pod {terminating.name} was deleted from outside the job.")
    if len(child.pods) < child.pods_expected:
        gone = child.pods_expected - len(child.pods)
        return Cause(InfraFailure.DELETED, f"{gone} of {child.pods_expected} pods disappeared without an error report.")
    if echoes:
        sentence = f"Every rank reported a failure of another rank, the first one: {echoes[0].sentence}"
        return Cause(FailureClass.PEER, sentence)
    return Cause(FailureClass.CRASH, child.message or "The attempt failed without an error report.")
