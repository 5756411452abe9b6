"""Where the ranks go on one machine."""

from __future__ import annotations

import pytest

from finetune_api.spec import Topology
from finetune_operator.devices import Gpu, Machine, parse_smi, visible
from finetune_operator.errors import UserError
from finetune_operator.local.processes.placement import place

GIB = 1 << 30


def machine(gpus: int = 0, cores: int = 8, memory: int = 64 * GIB) -> Machine:
    return Machine(tuple(Gpu(f"GPU-{letter}") for letter in "abcdefgh"[:gpus]), cores, memory)


@pytest.mark.parametrize(
    ("nodes", "wanted", "there", "placed", "ids"),
    [
        (1, None, 0, (1, 0), [()]),
        (2, None, 0, (2, 0), [(), ()]),
        (3, 0, 8, (3, 0), [(), (), ()]),
        (1, None, 4, (1, 4), [("GPU-a", "GPU-b", "GPU-c", "GPU-d")]),
        (2, None, 4, (2, 2), [("GPU-a", "GPU-b"), ("GPU-c", "GPU-d")]),
        (2, None, 1, (1, 1), [("GPU-a",)]),
        (3, None, 4, (3, 1), [("GPU-a",), ("GPU-b",), ("GPU-c",)]),
        (2, 1, 4, (2, 1), [("GPU-a",), ("GPU-b",)]),
    ],
)
def test_nodes_and_gpus_are_shared_out(
    nodes: int, wanted: int | None, there: int, placed: tuple[int, int], ids: list[tuple[str, ...]]
) -> None:
    placement = place(Topology(nodes=nodes, gpus_per_node=wanted), machine(there))
    assert (placement.nodes, placement.gpus_per_node) == placed
    assert [placement.gpu_ids(node) for node in range(placement.nodes)] == ids
    assert placement.ranks_per_node == max(1, placed[1])


@pytest.mark.parametrize(
    ("nodes", "there", "note"), [(3, 2, "run as one node with 2 GPUs"), (3, 4, "1 GPU of 4 left idle")]
)
def test_what_differs_from_the_file_is_said(nodes: int, there: int, note: str) -> None:
    assert note in place(Topology(nodes=nodes), machine(there)).notes[0]


@pytest.mark.parametrize(
    ("topology", "found", "way_out"),
    [
        (Topology(nodes=3, gpus_per_node=4), machine(0), "--set topology.gpusPerNode=0"),
        (Topology(nodes=3, gpus_per_node=4), machine(4), "--set topology.nodes=1 --set topology.gpusPerNode=4"),
        (Topology(nodes=100, gpus_per_node=0), machine(cores=2), "--set topology.nodes=8"),
        (Topology(nodes=8, gpus_per_node=0), machine(memory=3 * GIB), "--set topology.nodes=4"),
    ],
)
def test_what_cannot_be_started_is_refused_with_a_way_out(topology: Topology, found: Machine, way_out: str) -> None:
    with pytest.raises(UserError) as caught:
        place(topology, found)
    assert way_out in caught.value.sentence
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("allowed", "ids"),
    [
        (None, ["GPU-a", "GPU-b", "GPU-c"]),
        ("", []),
        ("2,0", ["2", "0"]),
        ("GPU-b", ["GPU-b"]),
        ("0,7,1", ["0"]),
        ("MIG-123", ["MIG-123"]),
        ("-1", []),
    ],
)
def test_cuda_visible_devices_is_honoured_as_cuda_does(allowed: str | None, ids: list[str]) -> None:
    assert [gpu.id for gpu in visible(machine(3).gpus, allowed)] == ids


def test_a_line_of_nvidia_smi_is_a_gpu() -> None:
    assert parse_smi("GPU-1f, NVIDIA A100-SXM4-80GB, 81920") == Gpu("GPU-1f", "NVIDIA A100-SXM4-80GB", 80 * GIB)
