"""The environment of the processes of one node on this machine. Pure.

What the pods of the cluster get, on top of the user's own environment.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetune_api.runconfig import Attempt
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.local.processes.placement import Node
from finetune_operator.programs import trainer_environment

PROCESS_VARIABLE = "FINETUNE_PROCESS"
"""`<uid>/<stage>/<n>/<node>`: every process of an attempt inherits it, so that none is lost."""
DROPPED_PREFIXES = ("PET_", "FINETUNE_", "TORCHELASTIC_")
DROPPED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""A rendezvous that was meant for others."""


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
    """The environment of a node's processes, but for the tokens' directory. `inherited` must hold no secrets.

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
