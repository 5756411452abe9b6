"""What a forked operator runs. Apart, so that the fork server finds it by a name that holds in every process."""

from __future__ import annotations

import os

from kubernetes.aio.config import kube_config

from finetune_operator import reconcile, service, workqueue  # noqa: F401 - imported before the fork, once for all
from finetune_operator.cluster import api
from finetune_operator.commands.operator import operator


def operate(environment: dict[str, str], log: str, request_timeout: float) -> None:
    """`finetune operator` in this environment, its words at the end of a log; impatient, because tests wait for it."""
    os.environ.clear()
    os.environ.update(environment)
    # Read from the environment when it was imported.
    kube_config.KUBE_CONFIG_DEFAULT_LOCATION = environment["KUBECONFIG"]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    api.REQUEST_TIMEOUT_SECONDS = request_timeout
    workqueue.BASE_SECONDS, workqueue.CAP_SECONDS = 0.1, 0.5
    reconcile.DOUBT_SECONDS = 1.0
    operator(namespaces=None, image="", backend="", log_format="text")
