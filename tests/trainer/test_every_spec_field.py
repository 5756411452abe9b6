"""Every field of the spec has an effect: changing it changes what the operator makes or what the trainer computes.

The fields are listed from the model itself, so a new one without a line here fails. Each line carries something out
with two values of its field, or names the test that does because it takes a training, an evaluation or a Hub.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.support.batches import examples, packed, padded
from tests.support.hub_server import HubServer, hub_in_this_process
from tests.support.jobs import manifest
from tests.support.loading import load
from tests.support.prepare_runs import prepare_context, write_rows
from tests.support.tiny import CHATML, tiny_llama
from tests.trainer.evaluate import test_evaluate_stage as evaluation
from tests.trainer.evaluate.test_gate import line
from tests.trainer.export import test_export as export
from tests.trainer.model import test_model_files, test_packed_attention
from tests.trainer.publish import test_publish_stage as publishing
from tests.trainer.train import test_checkpoint_faults
from tests.trainer.train import test_resume as resuming
from tests.trainer.train import test_spec_fields as training
from tests.trainer.train import test_training_with_shared_prefixes as sharing
from tests.trainer.train import test_world_sizes as world_sizes
from tests.unit.finetune_operator.decision.world import LENGTHS, MODEL_FACTS, World
from transformers import AutoModelForCausalLM

from finetune_api.base import ApiModel
from finetune_api.spec import FineTuneJobSpec, Training
from finetune_api.traits import Method, Task
from finetune_api.validate import check
from finetune_operator.manifests.children import all_manifests
from finetune_operator.manifests.job import Job
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.sizing.plan import plan_run
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.evaluate.compare import DatasetAnswers, compare
from finetune_trainer.evaluate.gate import decide_gate
from finetune_trainer.evaluate.metrics import Answer
from finetune_trainer.model.nf4 import write_nf4_copy
from finetune_trainer.prepare import fetch
from finetune_trainer.prepare import stage as prepare
from finetune_trainer.train import stage as train_stage
from finetune_trainer.train.optimizer import Optimizer
from finetune_trainer.train.schedule import Schedule

# --- what is looked at -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a check may write, and the tiny model and data that it may read."""

    work: Path
    tiny: Path
    seen: dict[tuple[str, str], object] = field(default_factory=dict)
    """What was seen already, by who looked and at which job."""


See = Callable[[FineTuneJobSpec, Place], object]


def manifests(spec: FineTuneJobSpec, _: Place) -> object:
    """What the operator makes, without the run config: to be copied into that is no effect."""
    made = all_manifests(Job("ml", "support", "uid-1", spec, spec.image or "trainer"), PyTorchJobBackend())
    return [each for each in made if "run-config.json" not in each.get("data", {})]


def plan(spec: FineTuneJobSpec, _: Place) -> object:
    """Memory, steps, time."""
    return plan_run(spec, MODEL_FACTS, LENGTHS).to_wire()


def after_a_crash(spec: FineTuneJobSpec, _: Place) -> object:
    """How the job stands when a rank has crashed."""
    return World(spec).training().with_pod_failed().all_ended().settled().reason


def after_an_hour(spec: FineTuneJobSpec, _: Place) -> object:
    """How the job stands when training has taken an hour."""
    return World(spec).training().later(3600).settled().reason


def at_the_end(spec: FineTuneJobSpec, _: Place) -> object:
    """When the operator looks at a finished job again."""
    return World(spec).complete().wakes()


def at_the_beginning(spec: FineTuneJobSpec, _: Place) -> object:
    """How a new job stands."""
    return World(spec).settled().reason


def prepared(spec: FineTuneJobSpec, place: Place) -> object:
    """Everything that Train and Evaluate read, but for where it came from."""
    context = prepare_context(place.work, ungated(spec), cache=place.work / "cache")
    prepare.run(context)
    stores = [DocumentStore(context.prepared / name) for name in ("train", "validation")]
    documents = [[np.asarray(a).tolist() for a in (s.ids, s.target_position, s.dataset)] for s in stores]
    rows = {path.name: path.read_text() for path in (context.prepared / "evaluation").glob("*.jsonl")}
    datasets = [
        dataset.model_dump(include={"name", "weight", "loss_weight", "labels"})
        for dataset in PreparedManifest.read(context.prepared).datasets
    ]
    return documents, rows, datasets


def ungated(spec: FineTuneJobSpec) -> dict[str, Any]:
    """The spec without requirements: for a gate, Prepare wants more rows than there are."""
    wire = dict(spec.to_wire())
    return wire | {"evaluation": wire.get("evaluation", {}) | {"gate": {"mustImprove": False}}}


def base_model(spec: FineTuneJobSpec, place: Place) -> object:
    """Which base model, adapter and 4-bit copy Train is given."""
    context = prepare_context(place.work, ungated(spec), cache=place.work / "cache")
    prepare.run(context)
    return PreparedManifest.read(context.prepared).model.model_dump(include={"directory", "adapter_directory"})


def learnt(spec: FineTuneJobSpec, place: Place) -> object:
    """Names and values of what is trained, after two steps on the same documents."""
    tuning, how, nf4 = spec.tuning, spec.training, None
    if tuning.method is Method.QLORA:
        nf4 = place.work / f"nf4-{tuning.quantization.type}-{tuning.quantization.double_quant}"
        write_nf4_copy(place.tiny, nf4, tuning.quantization)
    model = load(
        place.tiny,
        tuning,
        nf4_directory=nf4,
        seed=how.seed,
        neftune_alpha=how.neftune_alpha,
        label_smoothing=how.label_smoothing,
    )
    optimizer = Optimizer(
        dict(model.trainable),
        betas=(how.betas[0], how.betas[1]),
        weight_decay=how.weight_decay,
        max_grad_norm=how.max_grad_norm,
        b_plus_ratio=tuning.lora.b_plus_ratio,
    )
    schedule = Schedule(
        kind=how.scheduler.type,
        peak=how.learning_rate or 1e-3,
        total=8,
        warmup_ratio=how.scheduler.warmup_ratio,
        minimum_ratio=how.min_learning_rate_ratio,
    )
    documents = examples([9, 14], labelled=4)
    batch = padded(documents) if tuning.method in (Method.PROMPT, Method.PREFIX) else packed(documents)
    for step in (2, 5):
        torch.manual_seed(step)
        model(batch).sum().backward()
        optimizer.step(schedule(step), optimizer.squared_norm())
        optimizer.zero_grad()
    return [(name, tuple(p.shape), p.detach().double().sum().item()) for name, p in model.trainable]


def pinned(spec: FineTuneJobSpec, place: Place) -> object:
    """What is downloaded from a Hub whose repositories have a branch `old` beside `main`."""
    with HubServer() as hub, hub_in_this_process(hub, place.work / "home"):
        for name in ("acme/base", "acme/other"):
            repo = hub.add_repo(name, place.tiny)
            repo.refs["old"] = repo.head.id
            hub.push(repo, {"chat_template.jinja": CHATML.replace("im_end", "endoftext")})
        for name in ("acme/rows", "acme/other-rows"):
            repo = hub.add_repo(name, {"rows.jsonl": _jsonl(ROWS[:30])}, kind="datasets")
            repo.refs["old"] = repo.head.id
            hub.push(repo, {"rows.jsonl": _jsonl(ROWS[10:])})
        for name in ("acme/adapter", "acme/other-adapter"):
            repo = hub.add_repo(name, place.tiny / "adapters" / "first")
            repo.refs["old"] = repo.head.id
            hub.push(repo, {"README.md": "moved on"})
        context = prepare_context(place.work, ungated(spec), cache=place.work / "cache")
        fetch.run(context)
        prepare.run(context)
        manifest = PreparedManifest.read(context.prepared)
        return manifest.model.source, manifest.model.commit, manifest.model.adapter_source, manifest.datasets[0].source


def tracker(spec: FineTuneJobSpec, place: Place) -> object:
    """How W&B is asked for a run."""
    asked: dict[str, object] = {}
    (place.work / "tokens").mkdir(exist_ok=True)
    (place.work / "tokens" / "wandb").write_text("key")
    context = replace(prepare_context(place.work, ungated(spec)), tokens=place.work / "tokens")
    with mock.patch.object(train_stage, "WandbTracker", lambda **how: asked.update(how)):
        train_stage._build_tracker(context)
    return asked["project"], asked["entity"], asked["mode"]


def measured(spec: FineTuneJobSpec, _: Place) -> object:
    """What is measured of an answered row."""
    row = EvaluationRow("r/1", "r", Task.SUMMARIZATION, prompt="p", prompt_ids=[1], text="t", answers=["a b"])
    answered = DatasetAnswers("r", Task.SUMMARIZATION, [row], [Answer("a b")], [Answer("a c")])
    return [one.result.metric for one in compare([answered], spec.evaluation.metrics)]


def gate(spec: FineTuneJobSpec, _: Place) -> object:
    """What the gate says of a model that is no better, and right in seven rows of ten."""
    return decide_gate(spec.evaluation.gate, [line("tweets", -0.1, 0.1)], baseline=True).reason


# --- what is changed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """Giving the field `other` in place of what it was changes what `see` sees."""

    see: See
    other: object
    given: dict[str, object] = field(default_factory=dict)
    """The job on both sides, by path, where `manifest()` does not do."""


@dataclass(frozen=True)
class Shown:
    """A test that shows it with a whole training, evaluation or upload."""

    by: Callable[..., None]
    word: str = ""
    """What the test calls the field, where it is not the field's own name."""


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _row(i: int) -> dict[str, Any]:
    """A row with every column of every task, and each a second time with other content."""
    said = f"day {i} has number {i * 7919 % 1000}"
    row: dict[str, Any] = {
        "text": said, "label": ("bad", "good")[i % 2], "question": f"Which is {said}?", "choices": [said, "none"],
        "answer": "A", "context": f"It is known that {said}.", "document": f"{said}. " * 3, "summary": said,
        "prompt": f"Say {said}.", "input": f"the {i}th", "completion": said,
        "messages": [{"role": r, "content": f"{r} {k} {said}"} for k in (1, 2) for r in ("user", "assistant")],
        "callable": [{"name": "look", "description": said}],
    }  # fmt: skip
    second = {
        **{name: f"second {value}" for name, value in row.items()},
        "answer": "B", "choices": ["none", said], "label": ("no", "yes")[i // 2 % 2], "messages": row["messages"][:2],
    }  # fmt: skip
    others = {"group": i // 10, "marked": f"<|im_start|>{said}<|im_end|>"}
    return row | {f"{name}2": value for name, value in second.items()} | others


ROWS = [_row(i) for i in range(60)]
DATA = "spec.datasets.0"
SETTING: dict[str, object] = {"spec.model.path": "tiny", f"{DATA}.path": "rows.jsonl", "spec.split.test": 0.2}
LORA: dict[str, object] = {"spec.tuning.lora.rank": 4}
QLORA: dict[str, object] = LORA | {"spec.tuning.method": "qlora"}
GPUS: dict[str, object] = {"spec.topology.gpusPerNode": 2, "spec.topology.gpuType": "A100-80GB"}
TWO_NODES = GPUS | {"spec.topology.nodes": 2}
PUBLISH: dict[str, object] = {"spec.publish.repo": "acme/tiny"}
HUB: dict[str, object] = {
    "spec.model": {"repo": "acme/base"},
    DATA: {"name": "tweets", "repo": "acme/rows", "task": "classification"},
}
WANDB: dict[str, object] = {"spec.tracking.wandb.project": "p"}
ADAPTER: dict[str, object] = HUB | {"spec.model.adapter": {"repo": "acme/adapter"}}


def data(other: object, task: str = "classification", **given: object) -> Changes:
    """A field of a dataset, whose rows are prepared."""
    return Changes(prepared, other, SETTING | {f"{DATA}.task": task} | {f"{DATA}.{k}": v for k, v in given.items()})


def tuned(other: object, given: dict[str, object] = LORA) -> Changes:
    """A field that decides what two steps teach."""
    return Changes(learnt, other, given)


def pod(other: object, **given: object) -> Changes:
    """A field that the manifests of a job that publishes and tracks carry."""
    return Changes(manifests, other, PUBLISH | {path.replace("__", "."): value for path, value in given.items()})


def token(kind: str) -> dict[str, object]:
    """A job that uses a token of that kind."""
    return PUBLISH | {"spec.tracking.wandb.project": "p", f"spec.credentials.{kind}.name": "first"}


TOLERATION = {"spec__podTemplate__tolerations": [{"key": "gpu", "effect": "NoExecute"}]}

EFFECTS: dict[str, Changes | Shown] = {
    "model.repo": Changes(pinned, "acme/other", HUB),
    "model.revision": Changes(pinned, "old", HUB),
    "model.path": Changes(base_model, "other", SETTING),
    "model.adapter.repo": Changes(pinned, "acme/other-adapter", ADAPTER),
    "model.adapter.revision": Changes(pinned, "old", ADAPTER),
    "model.adapter.path": Changes(
        base_model, "tiny/adapters/second", SETTING | {"spec.model.adapter.path": "tiny/adapters/first"}
    ),
    "model.attention": Shown(test_packed_attention.test_losses_of_packed_documents_are_those_of_each_alone),
    "model.chatTemplate": Changes(prepared, CHATML.replace("im_end", "endoftext"), SETTING),
    "model.trustRemoteCode": Shown(test_model_files.test_a_model_that_comes_with_code_is_refused_unless_it_is_trusted),
    "datasets[].repo": Changes(pinned, "acme/other-rows", HUB),
    "datasets[].revision": Changes(pinned, "old", HUB),
    "datasets[].path": data("other.jsonl"),
    "datasets[].name": data("texts"),
    "datasets[].config": data("b", path="configs", config="a"),
    "datasets[].task": data("text"),
    "datasets[].columns.text": data("text2"),
    "datasets[].columns.label": data("label2"),
    "datasets[].columns.question": data("question2", "multiple-choice"),
    "datasets[].columns.choices": data("choices2", "multiple-choice"),
    "datasets[].columns.answer": data("answer2", "multiple-choice"),
    "datasets[].columns.context": data("context2", "question-answering"),
    "datasets[].columns.prompt": data("prompt2", "instruction"),
    "datasets[].columns.input": data("input2", "instruction"),
    "datasets[].columns.completion": data("completion2", "instruction"),
    "datasets[].columns.messages": data("messages2", "chat"),
    "datasets[].columns.tools": Changes(
        prepared,
        "callable",
        SETTING | {f"{DATA}.task": "chat", "spec.model.chatTemplate": "{{ tools | tojson if tools else '' }}" + CHATML},
    ),
    "datasets[].columns.system": data("text", "chat"),
    "datasets[].columns.document": data("document2", "summarization"),
    "datasets[].columns.summary": data("summary2", "summarization"),
    "datasets[].splits.train": data("test", path="parts"),
    "datasets[].splits.validation": data("validation", path="parts"),
    "datasets[].splits.test": data("test", path="parts"),
    "datasets[].weight": data(2.0),
    "datasets[].lossWeight": data(2.0),
    "datasets[].lossOn": data("last", "chat"),
    "datasets[].specialTokens": data("control", "text", **{"columns.text": "marked"}),
    "datasets[].maxRows": data(20),
    "datasets[].filter": data("'1' in text"),
    "datasets[].groupBy": data("group"),
    "datasets[].systemPrompt": data("Be brief."),
    "datasets[].template": data("Is it {{ text }}?"),
    "datasets[].answerTemplate": data("It is {{ label }}."),
    "split.validation": Changes(prepared, 0.4, SETTING),
    "split.test": Changes(prepared, 0.1, SETTING),
    "split.seed": Changes(prepared, 7, SETTING),
    "split.stratify": Changes(prepared, False, SETTING | {f"{DATA}.filter": "label == 'good' or group == 1"}),
    "tuning.method": tuned("full", {}),
    "tuning.lora.rank": tuned(2),
    "tuning.lora.alpha": tuned(8),
    "tuning.lora.dropout": tuned(0.5),
    "tuning.lora.targetModules": tuned("q_proj"),
    "tuning.lora.layers": tuned("1"),
    "tuning.lora.modulesToSave": tuned(["norm"]),
    "tuning.lora.dora": tuned(True),
    "tuning.lora.rslora": tuned(True),
    "tuning.lora.init": tuned("gaussian"),
    "tuning.lora.bPlusRatio": tuned(4),
    "tuning.prompt.virtualTokens": tuned(3, {"spec.tuning.method": "prompt"}),
    "tuning.prompt.initText": tuned("abc", {"spec.tuning.method": "prompt"}),
    "tuning.prefix.virtualTokens": tuned(3, {"spec.tuning.method": "prefix"}),
    "tuning.quantization.type": tuned("fp4", QLORA),
    "tuning.quantization.doubleQuant": tuned(False, QLORA),
    "tuning.quantization.computeDtype": tuned("bfloat16", QLORA),
    **{f"training.{name}": Shown(test) for name, test in training.SHOWN.items()},
    "training.scheduler.type": tuned("linear"),
    "training.scheduler.warmupRatio": tuned(0.5),
    "training.earlyStopping.metric": Shown(training.test_early_stopping_ends_training_and_the_best_step_is_exported),
    "training.earlyStopping.patience": Shown(training.test_early_stopping_ends_training_and_the_best_step_is_exported),
    "training.packing": Shown(world_sizes.test_micro_batches_without_packing_hold_one_document_a_row),
    "training.sharedPrefixes": Shown(sharing.test_losses_and_validations_are_those_without_sharing),
    "training.resumeFrom.claim": pod("others", spec__training__resumeFrom__path="ns/job/uid/checkpoints/step-1"),
    "training.resumeFrom.path": Shown(resuming.test_another_job_starts_from_the_weights_of_a_checkpoint),
    "topology.nodes": pod(3),
    "topology.gpusPerNode": pod(4),
    "topology.gpuType": Changes(plan, "H100", GPUS),
    "topology.sharding": Changes(plan, "hybrid", TWO_NODES),
    "checkpoint.everyMinutes": Shown(test_checkpoint_faults.test_minutes_between_checkpoints_are_those_of_the_spec),
    "checkpoint.keep": Shown(test_checkpoint_faults.test_the_newest_the_best_and_the_way_back_are_kept),
    "storage.cache.claimName": pod("others"),
    "storage.run.claimName": pod("mine"),
    "storage.run.size": pod("5Gi"),
    "storage.run.storageClassName": pod("fast"),
    "storage.run.accessMode": pod("ReadWriteMany"),
    "storage.run.keep": pod(False),
    "evaluation.baseline": Shown(evaluation.test_without_a_baseline_the_base_is_not_measured),
    "evaluation.fewShot": Changes(prepared, 2, SETTING),
    "evaluation.gate.mustImprove": Changes(gate, False),
    "evaluation.gate.minimum": Changes(gate, {"tweets/accuracy": 0.99}),
    "evaluation.maxRows": Changes(prepared, 5, SETTING),
    "evaluation.maxNewTokens": Shown(evaluation.test_max_new_tokens_cuts_free_answers),
    "evaluation.prompts": Shown(evaluation.test_prompts_of_the_spec_are_answered_on_the_page_by_both_models),
    "evaluation.metrics": Changes(measured, ["bleu"]),
    "publish.repo": Shown(publishing.test_the_evaluated_files_and_a_card_arrive_in_one_private_commit),
    "publish.path": Shown(publishing.test_a_directory_holds_the_files_and_the_card_and_doing_it_again_changes_nothing),
    "publish.private": Shown(publishing.test_a_public_repository_is_refused_where_it_has_to_be_private),
    "publish.format": Shown(export.test_merged_weights_compute_what_the_adapter_computes, "merged"),
    "tracking.wandb.project": Changes(tracker, "q", WANDB),
    "tracking.wandb.entity": Changes(tracker, "team", WANDB),
    "tracking.wandb.mode": Changes(tracker, "offline", WANDB),
    **{
        f"credentials.{kind}.{name}": Changes(manifests, "second", token(kind))
        for kind in ("hub", "publish", "wandb")
        for name in ("name", "key")
    },
    "retry.limit": Changes(after_a_crash, 0),
    "timeouts.activeDeadlineSeconds": Changes(after_an_hour, 1800),
    "timeouts.startup": pod("30m"),
    "timeouts.hang": pod("30m"),
    "cleanup.ttlSecondsAfterFinished": Changes(at_the_end, 60),
    "suspend": Changes(at_the_beginning, True),
    "podTemplate.nodeSelector": pod({"pool": "a100"}),
    "podTemplate.tolerations[].key": pod("other", **TOLERATION),
    "podTemplate.tolerations[].operator": pod("Exists", **TOLERATION),
    "podTemplate.tolerations[].value": pod("yes", **TOLERATION),
    "podTemplate.tolerations[].effect": pod("NoSchedule", **TOLERATION),
    "podTemplate.tolerations[].tolerationSeconds": pod(60, **TOLERATION),
    "podTemplate.priorityClassName": pod("high"),
    "podTemplate.queueName": pod("team"),
    "podTemplate.labels": pod({"team": "ml"}),
    "podTemplate.annotations": pod({"note": "x"}),
    "podTemplate.env[].name": pod("NCCL_B", spec__podTemplate__env=[{"name": "NCCL_A", "value": "1"}]),
    "podTemplate.env[].value": pod("2", spec__podTemplate__env=[{"name": "NCCL_A", "value": "1"}]),
    "podTemplate.resources.requests": pod({"cpu": "8"}),
    "podTemplate.resources.limits": pod({"memory": "64Gi"}),
    "podTemplate.cpuResources.requests": pod({"cpu": "8"}),
    "podTemplate.cpuResources.limits": pod({"memory": "64Gi"}),
    "image": pod("acme/trainer:2"),
    "imagePullSecrets[].name": pod("second", spec__imagePullSecrets=[{"name": "first"}]),
}

# --- the tests -------------------------------------------------------------------------------------------------------


def leaves(model: type[ApiModel], path: str = "") -> Iterator[str]:
    """Paths of all fields that hold no further model; `[]` stands behind a list of models."""
    for name, info in model.model_fields.items():
        inner, is_list = _model_in(info.annotation)
        here = f"{path}{info.alias or name}"
        if inner is None:
            yield here
        else:
            yield from leaves(inner, f"{here}[]." if is_list else f"{here}.")


def _model_in(annotation: Any) -> tuple[type[ApiModel] | None, bool]:
    """The model inside `Model | None`, `list[Model]` and the like, and whether there may be several."""
    if isinstance(annotation, type) and issubclass(annotation, ApiModel):
        return annotation, False
    is_list = typing.get_origin(annotation) is list
    for argument in typing.get_args(annotation):
        inner, inside_list = _model_in(argument)
        if inner is not None:
            return inner, is_list or inside_list
    return None, False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two tiny models, two adapters, and rows in all the shapes that the lines above ask for."""
    work = tmp_path_factory.mktemp("fields")
    for name, seed in (("tiny", 0), ("other", 1)):
        tiny_llama(work / name, hidden=16, heads=2, key_value_heads=1, intermediate=16, seed=seed)
    base = AutoModelForCausalLM.from_pretrained(work / "tiny")
    for name in ("first", "second"):
        config = LoraConfig(r=2, target_modules=["q_proj"])
        get_peft_model(copy.deepcopy(base), config).save_pretrained(work / "tiny" / "adapters" / name)
    write_rows(work / "rows.jsonl", ROWS)
    write_rows(work / "other.jsonl", ROWS[:40])
    write_rows(work / "configs" / "a" / "train.jsonl", ROWS)
    write_rows(work / "configs" / "b" / "train.jsonl", ROWS[:40])
    write_rows(work / "parts" / "train.jsonl", ROWS[:30])
    write_rows(work / "parts" / "validation.jsonl", ROWS[30:45])
    write_rows(work / "parts" / "test.jsonl", ROWS[45:])
    return Place(work, work / "tiny")


def test_every_field_that_can_be_changed_has_a_line_and_no_other() -> None:
    assert set(leaves(FineTuneJobSpec)) == {*EFFECTS, "training.optimizer"}
    assert typing.get_args(Training.model_fields["optimizer"].annotation) == ("adamw",), "a second one needs a line"


@pytest.mark.parametrize(
    ("see", "path", "other"),
    [
        (manifests, "spec.training.learningRate", 1e-5),
        (plan, "spec.split.seed", 7),
        (prepared, "spec.training.learningRate", 1e-5),
        (learnt, "spec.split.seed", 7),
        (gate, "spec.evaluation.maxRows", 5),
    ],
)
def test_what_is_looked_at_does_not_change_with_every_field(place: Place, see: See, path: str, other: object) -> None:
    assert seen(place, see, SETTING) == seen(place, see, SETTING | {path: other})


@pytest.mark.parametrize("path", [path for path, effect in EFFECTS.items() if isinstance(effect, Changes)])
def test_another_value_has_another_effect(place: Place, path: str) -> None:
    effect = EFFECTS[path]
    assert isinstance(effect, Changes)
    where = "spec." + path.replace("[]", ".0")
    before = seen(place, effect.see, effect.given)
    assert seen(place, effect.see, effect.given | {where: effect.other}) != before


def seen(place: Place, see: See, changes: dict[str, object]) -> object:
    """What `see` sees of the valid job with these changes, in a directory of its own; looked at once."""
    written = manifest(changes)
    key = see.__name__, json.dumps(written)
    if key not in place.seen:
        assert check(json.dumps(written)).problems == []
        work = Path(tempfile.mkdtemp(dir=place.work))
        for name in ("tiny", "other", "rows.jsonl", "other.jsonl", "configs", "parts"):
            (work / name).symlink_to(place.work / name)
        place.seen[key] = see(FineTuneJobSpec.model_validate(written["spec"]), replace(place, work=work))
    return place.seen[key]


@pytest.mark.parametrize("path", [path for path, effect in EFFECTS.items() if isinstance(effect, Shown)])
def test_the_test_that_shows_an_effect_names_the_field(path: str) -> None:
    effect = EFFECTS[path]
    assert isinstance(effect, Shown)
    name = effect.word or path.rpartition(".")[2]
    snake = re.sub(r"([A-Z])", lambda letter: f"_{letter[1].lower()}", name)
    marks = [str(mark.args) for mark in getattr(effect.by, "pytestmark", [])]
    told = " ".join([inspect.getsource(effect.by), *marks])
    assert effect.by.__name__.startswith("test_")
    assert name in told or snake in told or f"_{snake}_" in effect.by.__name__
