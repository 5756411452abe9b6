"""The environment of the processes of one node on this machine. Pure.

What the pods of the cluster get, on top of the user's own environment. A job file is data that others may have
written: of its variables, only those that tune a library are taken without being asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from finetune_api.runconfig import Attempt
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.errors import UserError
from finetune_operator.local.processes.placement import Node
from finetune_operator.programs import trainer_environment

PROCESS_VARIABLE = "FINETUNE_PROCESS"
"""`<uid>/<stage>/<n>/<node>`: every process of an attempt inherits it, so that none is lost."""
DROPPED_PREFIXES = ("PET_", "FINETUNE_", "TORCHELASTIC_")
DROPPED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""A rendezvous that was meant for others."""
_TUNING = re.compile(
    r"(NCCL|GLOO|TORCH_NCCL|TORCH_DISTRIBUTED|OMP|KMP|MKL|OPENBLAS|CUDA|CUBLAS|TOKENIZERS)_[A-Z0-9_]+"
    r"|PYTORCH_(CUDA_)?ALLOC_CONF|HF_HUB_(ENABLE|DISABLE|DOWNLOAD)_[A-Z0-9_]+|HF_HUB_ETAG_TIMEOUT|HF_XET_HIGH_PERFORMANCE"
    r"|WANDB_(NAME|TAGS|NOTES|RUN_GROUP|JOB_TYPE|ENTITY|PROJECT|MODE|SILENT|CONSOLE)|TRANSFORMERS_VERBOSITY|TZ|LANG|LC_ALL"
)
_HARMFUL = re.compile(r"PLUGIN|LIB|FILE|PATH|DIR|HOME|IFNAME|COMM_ID|INJECTION")
"""Even for those libraries: names of code to load, of files to write and of interfaces to listen on."""


def check_variables(spec: FineTuneJobSpec, allowed: Collection[str]) -> None:
    """Raise UserError for a variable of the job that may load code or redirect connections and is not `allowed`."""
    for index, variable in enumerate(spec.pod_template.env):
        name = variable.name
        if name not in allowed and (not _TUNING.fullmatch(name) or _HARMFUL.search(name)):
            raise UserError(
                f"spec.podTemplate.env[{index}]: {name} may load code or redirect connections in processes that hold "
                f"your tokens, so it is not taken from a job file: remove it, or add --allow-env {name}."
            )


def environment(
    inherited: Mapping[str, str],
    node: Node,
    attempt: Attempt,
    spec: FineTuneJobSpec,
    *,
    config_file: str,
    cache: str,
    interface: str,
) -> dict[str, str]:
    """Variables of a node's processes, but for what children.py gives each. `inherited` must hold no secrets.

    `interface` is where ranks listen unless the user says otherwise; empty leaves it to the launcher.
    """
    defaults = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    kept = {k: v for k, v in inherited.items() if not k.startswith(DROPPED_PREFIXES) and k not in DROPPED}
    common = trainer_environment(
        attempt,
        given=defaults | kept | {variable.name: variable.value for variable in spec.pod_template.env},
        config_file=config_file,
        hf_home=f"{cache}/huggingface",
        gpus=len(node.gpus),
        threads=node.threads,
        rendezvous=node.rendezvous,
    )
    return common | {"CUDA_VISIBLE_DEVICES": ",".join(node.gpus)}
