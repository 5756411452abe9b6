"""Where the ranks of a job run on this machine. Pure: from topology and machine to processes, or to an error.

A node of the cluster becomes one launcher here. What differs from the job's file is said in `notes`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_api.base import Stage
from finetune_api.rendezvous import Rendezvous
from finetune_api.spec import FineTuneJobSpec, Topology
from finetune_operator.devices import Gpu, Machine
from finetune_operator.errors import UserError
from finetune_operator.programs import Program, programs_of

BYTES_PER_PROCESS = 768 << 20
"""What a rank needs before it loads any model: interpreter, torch, gloo."""
PROCESSES_PER_CORE = 4
"""More CPU ranks than this per core make no useful progress."""


@dataclass(frozen=True)
class Node:
    """The local counterpart of a pod: programs that run one after the other, the last one being the stage."""

    programs: tuple[Program, ...]
    index: int = 0
    gpus: tuple[str, ...] = ()
    threads: int = 1
    """Per rank."""
    rendezvous: Rendezvous | None = None


@dataclass(frozen=True)
class Placement:
    """How many launchers there are, how many ranks each starts, and on which GPUs."""

    nodes: int
    gpus_per_node: int
    gpus: tuple[Gpu, ...] = ()
    cores: int = 1
    notes: tuple[str, ...] = ()
    rendezvous: Rendezvous | None = None
    """This machine's place among several; None: all nodes are on this machine."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks that a launcher starts: one per GPU, or one on the CPU."""
        return max(1, self.gpus_per_node)

    def gpu_ids(self, node: int) -> tuple[str, ...]:
        """The GPUs of one node, which is this machine where there are several."""
        first = 0 if self.rendezvous else node * self.gpus_per_node
        return tuple(gpu.id for gpu in self.gpus[first : first + self.gpus_per_node])

    def nodes_of(self, stage: Stage, spec: FineTuneJobSpec, port: int) -> tuple[Node, ...]:
        """The nodes of a stage: several for training, one for every other stage.

        `port` is for ranks that meet on this machine; several machines have a port of their own.
        """
        programs = programs_of(stage, spec)
        if stage is Stage.TRAIN:
            whole = self.rendezvous or Rendezvous(self.nodes, ranks_per_node=self.ranks_per_node, port=port)
            whole = replace(whole, ranks_per_node=self.ranks_per_node)
            here = self.ranks_per_node * (1 if self.rendezvous else self.nodes)
            return tuple(
                Node(programs, index, self.gpu_ids(index), self._threads(here), replace(whole, node_rank=index))
                for index in range(self.nodes)
            )
        if stage is Stage.EVALUATE:
            gpus = tuple(gpu.id for gpu in self.gpus)
            ranks = max(1, len(gpus))
            return (Node(programs, 0, gpus, self._threads(ranks), Rendezvous(ranks_per_node=ranks, port=port)),)
        return (Node(programs, threads=self.cores),)

    def _threads(self, ranks: int) -> int:
        return max(1, self.cores // ranks)

    def apply(self, topology: Topology) -> Topology:
        """The topology that is really run, for plan and run config."""
        return topology.model_copy(update={"nodes": self.nodes, "gpus_per_node": self.gpus_per_node})


def place(topology: Topology, machine: Machine) -> Placement:
    """The placement for `topology` on `machine`.

    Raises UserError if there are too few GPUs, or if the CPU ranks could not be started.
    """
    nodes, wanted, there = topology.nodes, topology.gpus_per_node, len(machine.gpus)
    if wanted is None:
        placement = _on_what_is_there(nodes, machine)
    elif wanted and wanted * nodes > there:
        raise UserError(_too_few(nodes, wanted, there))
    else:
        placement = Placement(nodes, wanted, machine.gpus[: nodes * wanted], machine.cores)
    if placement.gpus_per_node == 0:
        _refuse_too_many(placement.nodes, machine)
    return placement


def place_one_of(rendezvous: Rendezvous, topology: Topology, machine: Machine) -> Placement:
    """The placement on one of several machines, each of which is one node.

    Raises UserError if the machine has fewer GPUs than a node needs.
    """
    there = len(machine.gpus)
    wanted = there if topology.gpus_per_node is None else topology.gpus_per_node
    if wanted > there:
        raise UserError(
            f"topology.gpusPerNode is {wanted}, but machine {rendezvous.node_rank} has {_gpus(there)}: "
            f"add --set topology.gpusPerNode={there} on all machines to use what there is."
        )
    notes: tuple[str, ...] = ()
    if topology.nodes != rendezvous.nodes:
        count = rendezvous.nodes
        notes = (f"topology.nodes is {topology.nodes}, but there are {count} machines: running on {count}.",)
    return Placement(rendezvous.nodes, wanted, machine.gpus[:wanted], machine.cores, notes, rendezvous)


def _on_what_is_there(nodes: int, machine: Machine) -> Placement:
    there = len(machine.gpus)
    if there == 0:
        return Placement(nodes, 0, (), machine.cores)
    if there < nodes:
        note = f"{_gpus(there)} for {nodes} nodes: running as one node with {_gpus(there)}."
        return Placement(1, there, machine.gpus, machine.cores, (note,))
    per_node = there // nodes
    used = machine.gpus[: per_node * nodes]
    idle = there - len(used)
    notes = (f"{idle} of {_gpus(there)} idle: {there} cannot be divided evenly among {nodes} nodes.",) if idle else ()
    return Placement(nodes, per_node, used, machine.cores, notes)


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def _too_few(nodes: int, wanted: int, there: int) -> str:
    asked = f"topology asks for {_gpus(wanted * nodes)} ({nodes} × {wanted}), but this machine has {there or 'none'}"
    if there == 0:
        return f"{asked}: add --set topology.gpusPerNode=0 to train on the CPU, with one process per node."
    return f"{asked}: add --set topology.nodes=1 --set topology.gpusPerNode={there} to use what there is."


def _refuse_too_many(processes: int, machine: Machine) -> None:
    by_cores, by_memory = machine.cores * PROCESSES_PER_CORE, machine.memory_bytes // BYTES_PER_PROCESS
    most = max(1, min(by_cores, by_memory))
    if processes <= most:
        return
    scarce = f"{machine.cores} cores" if by_cores <= by_memory else f"{machine.memory_bytes / 2**30:.1f} GiB of memory"
    raise UserError(
        f"topology.nodes: {processes} processes are too many for {scarce}: use at most {most} "
        f"(--set topology.nodes={most})."
    )
