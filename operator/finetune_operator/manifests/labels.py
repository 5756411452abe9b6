"""Labels by which a job's children are found, on all objects of an attempt, its pods included."""

from __future__ import annotations

from collections.abc import Mapping

JOB = "finetune.dev/job"
STAGE = "finetune.dev/stage"
ATTEMPT = "finetune.dev/attempt"
REPLICA_INDEX = "training.kubeflow.org/replica-index"
"""Set by the training-operator on the pods of a PyTorchJob: the node's rank."""
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
"""Set by the Job controller on the pods of a TrainJob's Indexed Job: the node's rank."""


def node_rank(labels: Mapping[str, str]) -> int:
    """The node rank of a pod with these labels, of any backend; 0 for the only pod of a stage."""
    index = labels.get(REPLICA_INDEX) or labels.get(COMPLETION_INDEX) or "0"
    return int(index) if index.isdigit() else 0
