"""What a forked operator runs. Apart, so that the fork server finds it by a name that holds in every process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

from finetune_api.report import LengthFacts, ModelFacts, Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_operator import reconcile, service, workqueue
from finetune_operator.cli import run_command_line
from finetune_operator.cluster import api
from finetune_operator.commands import operator  # noqa: F401 - as above
from finetune_operator.decision import deadlines, progress, running_attempt
from finetune_operator.plan_worker import PlanWorker
from finetune_operator.sizing.plan import plan_run

_PR_SET_PDEATHSIG = 1
_TUNABLE = {
    "REQUEST_TIMEOUT_SECONDS": api,
    "BASE_SECONDS": workqueue,
    "CAP_SECONDS": workqueue,
    "RELIST_SECONDS": reconcile,
    "SECRET_POLL_SECONDS": reconcile,
    "TRANSIENT_POLL_SECONDS": running_attempt,
    "POD_CREATION_SECONDS": running_attempt,
    "GRACE_MARGIN_SECONDS": deadlines,
    "SETTLE_SECONDS": deadlines,
    "WRITE_INTERVAL_SECONDS": progress,
}


class PlanInProcess(PlanWorker):
    """Plans in the forked process: one of its own would take longer to start than many an operator here lives."""

    async def plan(
        self, spec: FineTuneJobSpec, model: ModelFacts, lengths: LengthFacts, price_per_gpu_hour: float | None
    ) -> Plan:
        return plan_run(spec, model, lengths, price_per_gpu_hour=price_per_gpu_hour)


def operate(environment: dict[str, str], log: str, tuned: Mapping[str, float]) -> None:
    """`finetune operator` in this environment, its words at the end of a log, with some constants (seconds) changed."""
    if sys.platform == "linux":
        # With the fork server, which ends with the tests, however they end.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name, seconds in tuned.items():
        setattr(_TUNABLE[name], name, seconds)
    service.PlanWorker = PlanInProcess  # type: ignore[misc]
    sys.exit(run_command_line(["operator"]))
