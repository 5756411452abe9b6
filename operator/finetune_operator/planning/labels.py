"""Labels by which a job's children are found: on everything that one attempt consists of, its pods included."""

from __future__ import annotations

JOB = "finetune.dev/job"
STAGE = "finetune.dev/stage"
ATTEMPT = "finetune.dev/attempt"
REPLICA_INDEX = "training.kubeflow.org/replica-index"
"""Set by the training-operator on the pods of a PyTorchJob: the node's rank."""
