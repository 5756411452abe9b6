"""Any number of ranks computes what one process computes, and none of them holds the whole model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tests.support.batches import Example, examples, packed, padded
from tests.support.loading import load, tuning
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from finetune_api.spec import Quantization, Tuning
from finetune_trainer.data.packing import Batch
from finetune_trainer.model import nf4
from finetune_trainer.model.build import CausalModel, check_bits
from finetune_trainer.model.nf4 import write_nf4_copy
from finetune_trainer.model.sharding import assert_sharded
from finetune_trainer.model.weights import (
    ModelWeights,
    SafetensorsDirectory,
    empty_model,
    read_config,
    whole,
    whole_on_leader,
)

Outcome = tuple[list[float], dict[str, NDArray[Any]]]

LENGTHS = (5, 17, 9, 12, 7, 3, 21)
STEPS = 3

METHODS: dict[str, Tuning] = {
    "full": tuning("full"),
    "lora": tuning("lora"),
    "upper layers": tuning("lora", layers="1"),
    "dora": tuning("lora", dora=True),
    "pissa": tuning("lora", init="pissa", rank=4),
    "head and embeddings": tuning("lora", targetModules="q_proj,embed_tokens,lm_head", rank=3),
    "saved head": tuning("lora", modulesToSave=["lm_head"]),
    "qlora": tuning("qlora"),
    "qlora with dora": tuning("qlora", dora=True),
    "prompt": tuning("prompt"),
    "prefix": tuning("prefix"),
}


def train(directory: Path, method: str, changes: dict[str, Any], replicas: int = 0) -> Outcome:
    """Three steps of AdamW over the documents, shared out over the ranks and over two micro-batches."""
    how = METHODS[method]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if replicas:
        names = ("replicate", "shard")
        changes = changes | {"mesh": init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=names)}
    if how.method == "qlora":
        changes = changes | {"nf4_directory": directory / "nf4"}
    model = load(directory, how, **changes)
    documents = examples(LENGTHS)
    collate: Callable[[list[Example]], Batch] = padded if how.method in ("prompt", "prefix") else packed
    labels = sum(len(document.target_id) for document in documents)
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trainable], lr=1e-2, eps=1e-4)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for last, share in ((False, documents[:4]), (True, documents[4:])):
            model.sync_gradients(last)
            batch = collate(share[rank::world])  # the last rank of three has nothing in the second
            loss = model(batch).sum() / labels
            loss.backward()
            total += loss.detach()
        if dist.is_initialized():
            dist.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses, {name: whole(parameter.detach()).clone().numpy() for name, parameter in model.trainable}


@pytest.fixture(scope="module", params=["tied", "untied and uneven"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its 4-bit copy; no dimension of the second one is a multiple of three."""
    path = tmp_path_factory.mktemp("model")
    sizes = {} if request.param == "tied" else {"tied": False, "hidden": 56, "intermediate": 100}
    tiny_llama(path, **sizes)
    write_nf4_copy(path, path / "nf4", Quantization())
    return path


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        np.testing.assert_allclose(found[1][name], values, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("method", list(METHODS))
def test_losses_and_trained_weights_are_the_same_on_one_two_and_three_ranks(directory: Path, method: str) -> None:
    expected = train(directory, method, {})
    for world_size in (1, 2, 3):
        results = run_ranks(world_size, train, directory, method, {})
        assert_same(results[0], expected)
        assert all(losses == results[0][0] for losses, _ in results)


def test_hybrid_sharding_computes_the_same(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    for method in ("full", "lora"):
        expected = train(directory, method, {})
        assert_same(run_ranks(4, train, directory, method, {}, 2)[0], expected)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_recomputing_activations_on_ranks_computes_the_same(directory: Path, method: str) -> None:
    expected = train(directory, method, {})
    assert_same(run_ranks(2, train, directory, method, {"activation_checkpointing": True})[0], expected)


# --- data types ------------------------------------------------------------------------------------------------------


def types(directory: Path, method: str) -> tuple[set[str], set[str], float]:
    """Data types of trained and of frozen parameters, and the first loss, with bfloat16 products."""
    changes: dict[str, Any] = {"precision": torch.bfloat16}
    if method == "qlora":
        changes["nf4_directory"] = directory / "nf4"
    model = load(directory, METHODS[method], **changes)
    trained = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    frozen = {str(p.dtype) for p in model.parameters() if not p.requires_grad}
    collate = padded if method in ("prompt", "prefix") else packed
    loss = model(collate(examples(LENGTHS))).mean()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for _, parameter in model.trainable)
    return trained, frozen, float(loss.detach())


@pytest.mark.parametrize(
    ("method", "frozen"),
    [
        ("full", set()),
        ("lora", {"torch.bfloat16"}),
        ("saved head", {"torch.bfloat16"}),
        ("qlora", {"torch.bfloat16", "torch.uint8"}),
        ("prompt", {"torch.bfloat16"}),
    ],
)
def test_what_is_trained_is_float32_and_what_is_frozen_is_not(directory: Path, method: str, frozen: set[str]) -> None:
    alone = types(directory, method)
    results = run_ranks(2, types, directory, method)
    for trained, found, loss in [alone, *results]:
        assert trained == {"torch.float32"}
        assert found == frozen
        assert loss == pytest.approx(alone[2], rel=1e-3)


# --- shards ----------------------------------------------------------------------------------------------------------


def matrices(directory: Path) -> dict[str, NDArray[Any]]:
    model = load(directory, METHODS["qlora"], nf4_directory=directory / "nf4")
    layers = nf4.linear_4bit(model.causal_lm)
    return {name: nf4.dequantized(layer, whole(layer.weight)).numpy() for name, layer in layers.items()}


def test_four_bit_weights_are_the_same_to_the_bit_on_any_number_of_ranks(directory: Path) -> None:
    expected = matrices(directory)
    assert len(expected) == 14
    for world_size in (2, 3):
        for found in run_ranks(world_size, matrices, directory):
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in expected)


def notices_a_flipped_bit(directory: Path) -> bool:
    model = load(directory, METHODS["qlora"], nf4_directory=directory / "nf4")
    base, layer = model.causal_lm, model.causal_lm.model.layers[0]
    with SafetensorsDirectory(directory / "nf4") as files:
        weights = ModelWeights(files, empty_model(read_config(directory), torch.float32))
        check_bits(base, layer, weights)
        if dist.get_rank() == 1:
            layer.self_attn.q_proj.base_layer.weight.to_local()[0] ^= 1
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj\.weight was altered"):
            check_bits(base, layer, weights)
    return True


def test_a_bit_that_is_altered_in_gathering_four_bit_weights_is_noticed(directory: Path) -> None:
    assert run_ranks(2, notices_a_flipped_bit, directory) == [True, True]


def gathered(shape: tuple[int, ...], mesh_shape: tuple[int, ...]) -> list[float]:
    """What a rank holds of a tensor of `shape` after it was gathered on the leader."""
    mesh = init_device_mesh("cpu", mesh_shape)
    source = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    placements = [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)]
    found: list[float] = whole_on_leader(distribute_tensor(source, mesh, placements)).flatten().tolist()
    return found


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)], ids=["sharded", "hybrid"])
@pytest.mark.parametrize("rows", [6, 5, 1])
def test_only_the_leader_gathers_a_sharded_tensor(rows: int, mesh_shape: tuple[int, ...]) -> None:
    shape = (rows, 2)
    leader, *others = run_ranks(math.prod(mesh_shape), gathered, shape, mesh_shape)
    assert leader == list(range(2 * rows))
    assert others == [[]] * len(others)


def local_elements(directory: Path, method: str) -> tuple[int, int]:
    model = load(directory, METHODS[method], nf4_directory=directory / "nf4")
    assert_sharded(model)
    parameters = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix"])
def test_each_rank_holds_its_share_of_every_parameter(directory: Path, method: str) -> None:
    (first, total), (second, _) = run_ranks(2, local_elements, directory, method)
    assert first + second == total
    assert first / total == pytest.approx(0.5, abs=0.02)


def test_a_model_that_is_not_sharded_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="parameters are not sharded"):
        assert_sharded(load(tiny_llama(tmp_path)))


# --- memory ----------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon")


def peak_of_loading(directory: Path, method: str) -> tuple[int, int]:
    """Most bytes above those before loading (files mapped into memory not counted), and bytes of the shard."""
    done, peak = threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    before = anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model: CausalModel = load(directory, METHODS[method], packing=False)  # loading alone, without its check
    done.set()
    watcher.join()
    shards = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return peak - before, sum(shard.numel() * shard.element_size() for shard in shards)


def test_a_rank_needs_its_shard_the_largest_tensor_and_a_constant_to_load(tmp_path: Path) -> None:
    small, large = tiny_llama(tmp_path / "small"), tmp_path / "large"
    tiny_llama(large, layers=10, hidden=512, heads=8, intermediate=2304)  # 180 MB
    largest, constant = 512 * 2304 * 4, 24 * 2**20
    for method in ("full", "lora"):
        run_ranks(2, peak_of_loading, small, method)  # what is imported on first use is not the model's
        for peak, shard in run_ranks(2, peak_of_loading, large, method):
            assert shard > 80 * 2**20
            assert peak < shard + largest + constant
