"""Which processes an attempt consists of: command lines and environments. Pure.

The same programs and variables as in the pods of the cluster; a node is one launcher here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.base import Stage
from finetune_api.runconfig import ATTEMPT_VARIABLE, Attempt
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.local.processes.placement import Placement
from finetune_operator.local.processes.tokens import TokenKind

CONFIG_VARIABLE = "FINETUNE_RUN_CONFIG"
LOOPBACK = "127.0.0.1"
PROCESS_VARIABLE = "FINETUNE_PROCESS"
"""`<uid>/<stage>/<n>/<node>`: every process of an attempt inherits it, so that none is lost."""


@dataclass(frozen=True)
class Step:
    """One program of a node, with the tokens that it alone may read."""

    name: str
    arguments: tuple[str, ...]
    tokens: tuple[TokenKind, ...] = ()

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "finetune_trainer", *self.arguments]


@dataclass(frozen=True)
class Node:
    """What stands in for one pod: programs that run one after the other, the last one being the stage."""

    index: int
    steps: tuple[Step, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


def nodes_of(attempt: Attempt, spec: FineTuneJobSpec, placement: Placement, port: int) -> tuple[Node, ...]:
    """The nodes of one attempt: several for training, one for every other stage.

    `port` is for ranks that meet on this machine; several machines have a port of their own.
    """
    if attempt.stage is Stage.TRAIN:
        step = Step("train", ("launch", "train"), ("wandb",))
        count, ranks, meeting = placement.nodes, placement.ranks_per_node, placement.meeting
        address, meeting_port = (meeting.address, meeting.port) if meeting else (LOOPBACK, port)
        here = ranks if meeting else count * ranks
        return tuple(
            Node(
                index,
                (step,),
                _rendezvous(count, index, ranks, address, meeting_port, attempt)
                | _devices(placement.gpu_ids(index), placement, here),
            )
            for index in range(count)
        )
    if attempt.stage is Stage.EVALUATE:
        gpus = tuple(gpu.id for gpu in placement.gpus)
        ranks = max(1, len(gpus))
        variables = _rendezvous(1, 0, ranks, LOOPBACK, port, attempt) | _devices(gpus, placement, ranks)
        return (Node(0, (Step("evaluate", ("launch", "evaluate")),), variables),)
    return (Node(0, _plain_steps(attempt.stage, spec), _devices((), placement, 1)),)


def _plain_steps(stage: Stage, spec: FineTuneJobSpec) -> tuple[Step, ...]:
    if stage is Stage.PUBLISH:
        return (Step("publish", ("publish",), ("publish",)),)
    prepare = Step("prepare", ("prepare",), ("hub",))
    # The write token must not be where models and data are downloaded and parsed: a process of its own.
    check = Step("check-publish", ("check-publish",), ("publish",))
    return (prepare,) if spec.publish is None else (check, prepare)


def _rendezvous(nodes: int, index: int, ranks: int, address: str, port: int, attempt: Attempt) -> dict[str, str]:
    return {
        "PET_NNODES": str(nodes),
        "PET_NODE_RANK": str(index),
        "PET_NPROC_PER_NODE": str(ranks),
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": str(port),
        "PET_RDZV_CONF": f"timeout={attempt.startup_seconds}",
    }


def _devices(gpus: tuple[str, ...], placement: Placement, ranks: int) -> dict[str, str]:
    threads = max(1, placement.cores // ranks)
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "OMP_NUM_THREADS": str(threads)}


DROPPED_PREFIXES = ("PET_", "FINETUNE_", "TORCHELASTIC_")
DROPPED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


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

    `interface` is where ranks listen unless told otherwise; empty leaves it to the launcher.
    """
    kept = {k: v for k, v in inherited.items() if not k.startswith(DROPPED_PREFIXES) and k not in DROPPED}
    defaults = {"TOKENIZERS_PARALLELISM": "false"}
    if interface:
        defaults |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    given = {variable.name: variable.value for variable in spec.pod_template.env}
    threads = kept.get("OMP_NUM_THREADS") or node.variables["OMP_NUM_THREADS"]
    return (
        defaults
        | kept
        | given
        | dict(node.variables)
        | {
            "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", threads),
            "HF_HOME": f"{cache}/huggingface",
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            CONFIG_VARIABLE: config_file,
            ATTEMPT_VARIABLE: attempt.model_dump_json(by_alias=True, exclude_none=True),
        }
    )
