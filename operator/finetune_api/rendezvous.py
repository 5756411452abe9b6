"""Which of how many machines this is, and where its ranks meet: read from and written to environment variables. Pure.

Pods get torchrun's own variables (PET_*) from the operator; rented clusters (RunPod) set names of their own. In both
cases rendezvous is static: ranks follow from the machine's number, and a machine that comes late is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_PORT = 23456


@dataclass(frozen=True)
class Rendezvous:
    """One machine's place among those that train together."""

    nodes: int = 1
    node_rank: int = 0
    ranks_per_node: int = 1
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    node_address: str = ""
    """This machine's own address in the network of the machines, if known: gloo and NCCL use its interface."""

    @property
    def ranks(self) -> range:
        """The ranks of this machine."""
        return range(self.node_rank * self.ranks_per_node, (self.node_rank + 1) * self.ranks_per_node)

    def to_environment(self) -> dict[str, str]:
        """The variables from which `rendezvous_of` reads it back."""
        own = {TORCHRUN.node_address: self.node_address} if self.node_address else {}
        return own | {
            TORCHRUN.nodes: str(self.nodes),
            TORCHRUN.node_rank: str(self.node_rank),
            TORCHRUN.ranks_per_node: str(self.ranks_per_node),
            TORCHRUN.address[0]: self.address,
            TORCHRUN.port[0]: str(self.port),
        }


@dataclass(frozen=True)
class Names:
    """Names of the variables; of several, the first that is set counts."""

    nodes: str
    node_rank: str
    ranks_per_node: str
    address: tuple[str, ...]
    port: tuple[str, ...]
    node_address: str


TORCHRUN = Names(
    nodes="PET_NNODES",
    node_rank="PET_NODE_RANK",
    ranks_per_node="PET_NPROC_PER_NODE",
    address=("PET_MASTER_ADDR",),
    port=("PET_MASTER_PORT",),
    node_address="PET_LOCAL_ADDR",
)
RUNPOD = Names(
    nodes="NUM_NODES",
    node_rank="NODE_RANK",
    ranks_per_node="NUM_TRAINERS",
    address=("PRIMARY_ADDR", "MASTER_ADDR"),
    port=("PRIMARY_PORT", "MASTER_PORT"),
    node_address="NODE_ADDR",
)
"""What RunPod's Instant Clusters set on each machine."""


def rendezvous_of(environ: Mapping[str, str]) -> Rendezvous:
    """torchrun's variables where they are set, else RunPod's where NUM_NODES and NODE_RANK are, else one machine.

    Raises ValueError, with a sentence, for impossible numbers and for several machines without an address.
    """
    if any(environ.get(name) for name in (TORCHRUN.nodes, TORCHRUN.node_rank, TORCHRUN.ranks_per_node)):
        names = TORCHRUN
    elif environ.get(RUNPOD.nodes) and environ.get(RUNPOD.node_rank):
        names = RUNPOD
    else:
        return Rendezvous()
    address, port = _first_set(environ, names.address), _first_set(environ, names.port)
    made = Rendezvous(
        nodes=_number(environ, names.nodes, 1, least=1),
        node_rank=_number(environ, names.node_rank, 0),
        ranks_per_node=_number(environ, names.ranks_per_node, 1, least=1),
        address=environ.get(address) or Rendezvous.address,
        port=_number(environ, port, DEFAULT_PORT, least=1),
        node_address=environ.get(names.node_address, "").partition("/")[0],
    )
    if made.node_rank >= made.nodes:
        raise ValueError(
            f"{names.node_rank} is {made.node_rank}, but {names.nodes} is {made.nodes}: machines are numbered from 0."
        )
    if made.nodes > 1 and not environ.get(address):
        raise ValueError(f"{names.nodes} is {made.nodes}, but {address}, the address of machine 0, is not set.")
    return made


def _first_set(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    """The first name that has a value; the first of all where none has."""
    return next((name for name in names if environ.get(name)), names[0])


def _number(environ: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} is {text!r}, but must be an integer of at least {least}.")
    return int(text)
