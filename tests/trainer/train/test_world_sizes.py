"""The same losses and weights on any number of ranks, and the loss that was written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.train.jobs import PAD, DatasetOf, Job, make_job, start, train

from finetune_api.spec import Lora, Tuning
from finetune_api.traits import Method, Task
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.model.build import load_model
from finetune_trainer.train.batches import MicroBatcher
from finetune_trainer.train.objective import CrossEntropy

UNEVEN = [20, 31, 17, 44, 25, 60, 13, 38, 29, 41, 9, 90, 22, 35, 51]
TRAINING = {"globalBatchSize": 6, "maxSteps": 10, "learningRate": 2e-3, "validateEvery": 5, "lossReduction": "example"}


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Job]:
    """The same job on 1, 2 and 3 ranks, and on 2 nodes that each hold the whole model."""
    jobs = {}
    for name, ranks in (("1", 1), ("2", 2), ("3", 3), ("hybrid", 2)):
        datasets = [DatasetOf("a", UNEVEN), DatasetOf("b", UNEVEN[::-1], labelled=2, weight=0.6, loss_weight=2)]
        job = make_job(tmp_path_factory.mktemp(name), model, datasets, training=TRAINING)
        job.configure(topology={"gpusPerNode": 0, "sharding": "hybrid" if name == "hybrid" else "full"})
        assert start(job, ranks, ranks_per_node=1).wait() == [0] * ranks
        jobs[name] = job
    return jobs


@pytest.mark.parametrize("name", ["2", "3", "hybrid"])
def test_losses_of_ten_steps_do_not_depend_on_the_ranks(by_ranks: dict[str, Job], name: str) -> None:
    alone, together = by_ranks["1"].rows(), by_ranks[name].rows()
    assert len(alone) == len(together) == 10
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert [row["gradNorm"] for row in together] == pytest.approx([row["gradNorm"] for row in alone], rel=1e-4)
    assert [row["tokens"] for row in together] == [row["tokens"] for row in alone]
    validations = [
        [row["validation"][key] for row in job.validations() for key in ("loss", "accuracy")]
        for job in (by_ranks["1"], by_ranks[name])
    ]
    assert validations[1] == pytest.approx(validations[0], rel=1e-5)


@pytest.mark.parametrize("name", ["2", "3", "hybrid"])
def test_the_adapters_do_not_depend_on_the_ranks(by_ranks: dict[str, Job], name: str) -> None:
    alone, together = (load_file(next(by_ranks[n].run.glob("export/*.safetensors"))) for n in ("1", name))
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-4, atol=1e-4)


def test_the_loss_falls(by_ranks: dict[str, Job]) -> None:
    losses = by_ranks["2"].losses()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("packing", [True, False])
def test_one_step_of_a_mixed_job_is_the_sum_over_its_examples_one_by_one(
    tmp_path: Path, model: Path, reduction: Literal["token", "example"], packing: bool
) -> None:
    job = make_job(tmp_path, model, [DatasetOf("a", UNEVEN[:5], labelled=4), DatasetOf("b", UNEVEN[5:9])])
    store = DocumentStore(job.run / "prepared" / "train")
    loss_weights = np.array([3.0, 1.0])
    examples = np.array([0, 8, 3, 6, 1, 5])
    root = load_model(
        directory=model,
        method=Method.LORA,
        tuning=Tuning(method=Method.LORA, lora=Lora(rank=4)),
        precision=torch.float32,
        device=torch.device("cpu"),
        mesh=None,
        seed=3,
        packing=packing,
    )
    for rank in range(3):  # three ranks, one after the other: gradients are summed
        batcher = MicroBatcher(store, loss_weights, reduction, 96, PAD, rank, 3, packing)
        for batch in batcher.batches(batcher.assign_rows(examples)):
            CrossEntropy()(root, batch).loss.backward()
    summed = {name: p.grad.clone() for name, p in root.trainable if p.grad is not None}
    root.zero_grad(set_to_none=True)

    total = torch.zeros(())
    labels = sum(len(store[i].target_id) for i in examples)
    for index in examples:
        document = store[int(index)]
        logits = root.causal_lm(torch.from_numpy(document.ids.astype(np.int64))[None]).logits[0]
        losses = -torch.log_softmax(logits, -1)[document.target_position.tolist(), document.target_id.tolist()]
        factor = loss_weights[document.dataset]
        total = total + (losses.sum() * factor / labels if reduction == "token" else losses.mean() * factor / 6)
    total.backward()
    assert summed.keys() == {name for name, p in root.trainable if p.grad is not None}
    for name, parameter in root.trainable:
        torch.testing.assert_close(summed[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_without_packing_hold_one_document_a_row(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, [DatasetOf("a", UNEVEN)], training={**TRAINING, "packing": False, "maxSteps": 2})
    packed = make_job(tmp_path / "packed", model, [DatasetOf("a", UNEVEN)], training={**TRAINING, "maxSteps": 2})
    assert train(job) == train(packed) == [0]
    assert job.losses() == pytest.approx(packed.losses(), rel=1e-5)
    assert job.report().choices["packing"].value == "off"
    assert job.report().choices["microBatchTokens"].value == "96"


def test_tasks_with_closed_labels_are_scored_by_whole_answers(tmp_path: Path, model: Path) -> None:
    accuracies = {}
    for task in (Task.CLASSIFICATION, Task.TEXT):
        job = make_job(tmp_path / task, model, [DatasetOf("a", UNEVEN, labelled=3, task=task)])
        job.configure(training={**TRAINING, "maxSteps": 4, "learningRate": 2e-2, "validateEvery": 1})
        assert train(job) == [0]
        accuracies[task] = [row["validation"]["accuracy"] for row in job.validations()]
    assert all(
        whole <= part for whole, part in zip(accuracies[Task.CLASSIFICATION], accuracies[Task.TEXT], strict=True)
    )
    assert {round(6 * a, 6) % 1 for a in accuracies[Task.CLASSIFICATION]} == {0.0}
