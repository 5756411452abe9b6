"""Where the ranks go on one machine."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from finetune_api.spec import Topology
from finetune_operator.devices import Gpu, Machine, detect_gpus, visible
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
    ("nodes", "there", "note"), [(3, 2, "running as one node with 2 GPUs"), (3, 4, "1 of 4 GPUs idle")]
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


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that knows an A100, a GPU that shares the memory of its CPU, and a lost one."""

    def handle(index: int) -> int:
        return index if index < 2 else missing()

    def missing(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def memory(device: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB if device == 0 else missing())

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", ["GPU-1f", "GPU-2f"].__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", ["NVIDIA A100-SXM4-80GB", "NVIDIA GB10"].__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)


@pytest.mark.usefixtures("driver")
def test_gpus_are_those_that_the_driver_names() -> None:
    assert detect_gpus() == (Gpu("GPU-1f", "NVIDIA A100-SXM4-80GB", 80 * GIB), Gpu("GPU-2f", "NVIDIA GB10"), Gpu("2"))


def test_there_are_no_gpus_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert detect_gpus() == ()
