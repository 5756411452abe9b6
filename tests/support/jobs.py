"""Jobs for tests: a small valid one, and for each rule of the API one that breaks it alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from finetune_api.spec import FineTuneJob

ABSENT = object()
"""As a value in `changes`: take the field out."""


def manifest(changes: dict[str, Any] | None = None, name: str = "tiny") -> dict[str, Any]:
    """A valid manifest with `changes` by path: `{"spec.training.epochs": 3, "spec.datasets.0.task": "chat"}`."""
    job: dict[str, Any] = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"path": "models/tiny"},
            "datasets": [{"name": "tweets", "path": "tweets.csv", "task": "classification"}],
            "tuning": {"method": "lora"},
        },
    }
    for path, value in (changes or {}).items():
        _set(job, path, value)
    return job


def job(changes: dict[str, Any] | None = None, name: str = "tiny") -> FineTuneJob:
    """The same as a model."""
    return FineTuneJob.model_validate(manifest(changes, name))


def _set(target: Any, path: str, value: Any) -> None:
    parts = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part, following in pairwise(parts):
        if isinstance(target, dict):
            target = target.setdefault(part, [] if isinstance(following, int) else {})
        else:
            target = target[part]
    last = parts[-1]
    if value is ABSENT:
        del target[last]
    elif isinstance(target, list) and last == len(target):
        target.append(copy.deepcopy(value))
    else:
        target[last] = copy.deepcopy(value)


@dataclass(frozen=True)
class Broken:
    """A job that breaks one rule, and what is said about it."""

    path: str
    """Field that the sentence is about."""
    says: str
    """How the sentence begins, long enough to tell the rules apart."""
    changes: dict[str, Any]
    """What makes `manifest()` break the rule."""
    before: dict[str, Any] | None = None
    """For a change of a job that is there already: what it was made with."""
    valid: dict[str, Any] = field(default_factory=dict)
    """A neighbour that is right, to show that the rule forbids no more than it must."""


TWO_NODES = {"spec.topology.nodes": 2}
GATE_OFF = {"spec.evaluation.gate.mustImprove": False}
ALL_TRAIN = {"spec.split.validation": 0}
CHAT = {"spec.datasets.0.task": "chat"}


def _columns(task: str, foreign: str, own: str) -> Broken:
    base = {"spec.datasets.0.task": task}
    return Broken(
        "spec.datasets[0].columns",
        f"task {task} reads only the columns",
        base | {f"spec.datasets.0.columns.{foreign}": "x"},
        valid=base | {f"spec.datasets.0.columns.{own}": "x"},
    )


def _fixed(name: str, change: dict[str, Any], before: dict[str, Any] | None = None) -> Broken:
    return Broken(f"spec.{name}", f"{name} cannot change once the job exists", change, before=before or {})


PREFIX = {"spec.tuning.method": "prefix"}
PROMPT = {"spec.tuning.method": "prompt"}

BROKEN: tuple[Broken, ...] = (
    Broken("metadata.name", "a job's name becomes part of host names", {"metadata.name": "a.b"}),
    Broken("metadata.name", "a job's name becomes part of host names", {"metadata.name": "a" * 64}),
    Broken("spec.model", "set exactly one of repo", {"spec.model": {"repo": "a/b", "path": "c"}}),
    Broken("spec.model", "set exactly one of repo", {"spec.model": {}}),
    Broken("spec.model.revision", "revision is a branch", {"spec.model.revision": "v2"}),
    Broken("spec.model.adapter", "set exactly one of repo", {"spec.model.adapter": {}}),
    Broken(
        "spec.model.adapter.revision", "revision is a branch", {"spec.model.adapter": {"path": "a", "revision": "v2"}}
    ),
    Broken("spec.datasets[0]", "set exactly one of repo", {"spec.datasets.0.repo": "a/b"}),
    Broken("spec.datasets[0].revision", "revision is a branch", {"spec.datasets.0.revision": "v2"}),
    Broken(
        "spec.datasets[0].task",
        "set task to one of",
        {"spec.datasets.0": {"name": "a", "repo": "some/data"}},
        valid={"spec.datasets.0": {"name": "a", "repo": "PolyAI/banking77"}},
    ),
    _columns("classification", foreign="messages", own="label"),
    _columns("multiple-choice", foreign="label", own="choices"),
    _columns("question-answering", foreign="choices", own="context"),
    _columns("instruction", foreign="answer", own="completion"),
    _columns("chat", foreign="text", own="messages"),
    _columns("summarization", foreign="text", own="summary"),
    _columns("text", foreign="label", own="text"),
    *(
        Broken(
            f"spec.datasets[0].{name}",
            f"{name} has no effect on task {task}",
            {"spec.datasets.0.task": task, f"spec.datasets.0.{name}": "x"},
            valid={"spec.datasets.0.task": "summarization", f"spec.datasets.0.{name}": "x"},
        )
        for name, task in (
            ("template", "chat"),
            ("answerTemplate", "chat"),
            ("answerTemplate", "text"),
            ("systemPrompt", "text"),
        )
    ),
    Broken(
        "spec.datasets[0].lossOn",
        "lossOn: last selects turns",
        {"spec.datasets.0.lossOn": "last"},
        valid=CHAT | {"spec.datasets.0.lossOn": "last"},
    ),
    Broken(
        "spec.datasets[0].specialTokens",
        "specialTokens: control has no effect",
        {"spec.datasets.0.specialTokens": "control"},
        valid={"spec.datasets.0.task": "text", "spec.datasets.0.specialTokens": "control"},
    ),
    Broken(
        "spec.datasets",
        "two datasets have the same name",
        {"spec.datasets.1": {"name": "tweets", "path": "b.csv", "task": "chat"}},
        valid={"spec.datasets.1": {"name": "chats", "path": "b.csv", "task": "chat"}},
    ),
    Broken(
        "spec.split",
        "validation (0.2 if it is not set) and test must add up",
        {"spec.split": {"validation": 0.5, "test": 0.5}},
        valid={"spec.split": {"validation": 0.5, "test": 0.4}},
    ),
    Broken(
        "spec.split",
        "no rows are held out for the gate",
        ALL_TRAIN,
        valid=ALL_TRAIN | {"spec.datasets.0.splits.test": "test"},
    ),
    Broken(
        "spec.split",
        "no rows are held out for the gate",
        ALL_TRAIN | GATE_OFF | {"spec.evaluation.gate.minimum": {"tweets/accuracy": 0.5}},
        valid=ALL_TRAIN | GATE_OFF,
    ),
    Broken(
        "spec.training.earlyStopping",
        "early stopping needs validation rows",
        {"spec.split": {"validation": 0, "test": 0.2}, "spec.training.earlyStopping": {}},
        valid={"spec.training.earlyStopping": {}},
    ),
    Broken(
        "spec.evaluation.gate.minimum",
        "keys of minimum must be <dataset>/<metric>",
        {"spec.evaluation.gate.minimum": {"banking/accuracy": 0.5}},
        valid={"spec.evaluation.gate.minimum": {"tweets/accuracy": 0.5, "macro/accuracy": 0.5}},
    ),
    Broken("spec.evaluation.gate.mustImprove", "mustImprove compares", {"spec.evaluation.baseline": False}),
    Broken(
        "spec.evaluation.fewShot",
        "fewShot prompts the untuned model",
        GATE_OFF | {"spec.evaluation.baseline": False, "spec.evaluation.fewShot": 2},
        valid=GATE_OFF | {"spec.evaluation.baseline": False},
    ),
    Broken("spec.tuning.lora", "lora is used only by", PROMPT | {"spec.tuning.lora.rank": 8}, valid=PROMPT),
    Broken("spec.tuning.prompt", "prompt is used only by", {"spec.tuning.prompt.virtualTokens": 8}),
    Broken("spec.tuning.prefix", "prefix is used only by", {"spec.tuning.prefix.virtualTokens": 8}),
    Broken("spec.tuning.quantization", "quantization is used only by", {"spec.tuning.quantization.type": "fp4"}),
    Broken(
        "spec.tuning.lora.init",
        "pissa needs the singular vectors",
        {"spec.tuning": {"method": "qlora", "lora": {"init": "pissa"}}},
        valid={"spec.tuning": {"method": "lora", "lora": {"init": "pissa"}}},
    ),
    *(
        Broken(
            "spec.tuning.lora.modulesToSave",
            "qlora stores attention and feed-forward layers in 4 bits",
            {"spec.tuning": {"method": "qlora", "lora": {"modulesToSave": ["lm_head", name]}}},
            valid={"spec.tuning": {"method": method, "lora": {"modulesToSave": saved}}},
        )
        for name, method, saved in (
            ("down_proj", "qlora", ["lm_head", "embed_tokens"]),
            ("model.layers.0.self_attn.q_proj", "lora", ["down_proj"]),
        )
    ),
    Broken(
        "spec.training.resumeFrom.path",
        "path must be relative to the claim",
        {"spec.training.resumeFrom": {"claim": "older-run", "path": "/data/ml/older/checkpoints/step-00000100"}},
        valid={"spec.training.resumeFrom": {"claim": "older-run", "path": "ml/older/checkpoints/step-00000100"}},
    ),
    *(
        Broken(
            "spec.model.attention",
            "flash, flex and varlen attention need GPUs",
            {"spec.model.attention": kernel, "spec.topology.gpusPerNode": 0},
            valid={"spec.model.attention": other, "spec.topology.gpusPerNode": count},
        )
        for kernel, other, count in (("flex", "flex", 1), ("flash", "sdpa", 0), ("varlen", "eager", 0))
    ),
    *(
        Broken(
            "spec.model.attention",
            "flash and varlen attention support only 16-bit precision",
            {"spec.model.attention": kernel, "spec.training.precision": "fp32"},
            valid={"spec.model.attention": other, "spec.training.precision": precision},
        )
        for kernel, other, precision in (("flash", "flex", "fp32"), ("varlen", "varlen", "bf16"))
    ),
    *(
        Broken(
            "spec.model.attention",
            "varlen attention needs packed sequences",
            {"spec.model.attention": "varlen", **unpacked},
            valid={"spec.model.attention": "varlen", "spec.training.packing": True},
        )
        for unpacked in ({"spec.training.packing": False}, {"spec.tuning.method": "prefix"})
    ),
    Broken(
        "spec.model.adapter",
        "adapter is a LoRA adapter to continue training",
        {"spec.model.adapter.path": "a", "spec.tuning.method": "full"},
        valid={"spec.model.adapter.path": "a", "spec.tuning.method": "qlora"},
    ),
    Broken(
        "spec.tuning.lora",
        "an existing adapter keeps its shape",
        {"spec.model.adapter.path": "a", "spec.tuning.lora.rank": 8},
        valid={"spec.model.adapter.path": "a", "spec.tuning.lora.bPlusRatio": 4},
    ),
    Broken(
        "spec.training.resumeFrom",
        "adapter and training.resumeFrom are both starting points",
        {"spec.model.adapter.path": "a", "spec.training.resumeFrom.path": "b"},
        valid={"spec.training.resumeFrom.path": "b"},
    ),
    Broken(
        "spec.training.packing",
        "prompt and prefix add their tokens once per sequence",
        PROMPT | {"spec.training.packing": True},
        valid=PROMPT | {"spec.training.packing": False},
    ),
    Broken(
        "spec.training.sharedPrefixes",
        "sharedPrefixes needs packing",
        {"spec.training.sharedPrefixes": True, "spec.tuning.lora": {"dropout": 0.1}},
        valid={"spec.training.sharedPrefixes": True, "spec.tuning.lora": {"dropout": 0.0}},
    ),
    Broken(
        "spec.training.sharedPrefixes",
        "sharedPrefixes needs packing",
        {"spec.training.sharedPrefixes": True, "spec.training.neftuneAlpha": 5},
        valid={"spec.training.sharedPrefixes": False, "spec.training.neftuneAlpha": 5},
    ),
    Broken(
        "spec.training.sharedPrefixes",
        "sharedPrefixes needs packing",
        PROMPT | {"spec.training.sharedPrefixes": True},
        valid=PROMPT | {"spec.training.sharedPrefixes": False},
    ),
    Broken(
        "spec.training.activationCheckpointing",
        "prefix passes its keys and values",
        PREFIX | {"spec.training.activationCheckpointing": True},
        valid=PROMPT | {"spec.training.activationCheckpointing": True},
    ),
    Broken(
        "spec.training.minLearningRateRatio",
        "the constant schedule does not decay",
        {"spec.training.scheduler.type": "constant", "spec.training.minLearningRateRatio": 0.1},
        valid={"spec.training.minLearningRateRatio": 0.1},
    ),
    Broken(
        "spec.publish.format",
        "prompt and prefix are not part of the weights",
        PREFIX | {"spec.publish": {"repo": "a/b", "format": "merged"}},
        valid={"spec.publish": {"repo": "a/b", "format": "merged"}},
    ),
    Broken("spec.publish", "set exactly one of repo", {"spec.publish": {"format": "adapter"}}),
    Broken(
        "spec.publish.private", "private applies to a Hub repository", {"spec.publish": {"path": "a", "private": False}}
    ),
    Broken(
        "spec.topology.gpuType",
        "gpusPerNode: 0 trains on CPUs",
        {"spec.topology": {"gpusPerNode": 0, "gpuType": "H100"}},
        valid={"spec.topology": {"gpuType": "H100"}},
    ),
    Broken(
        "spec.storage.run.accessMode",
        "several nodes write to the run volume",
        TWO_NODES | {"spec.storage.run.accessMode": "ReadWriteOnce"},
        valid=TWO_NODES,
    ),
    Broken(
        "spec.storage.run.claimName",
        "size, storageClassName and accessMode apply to a claim that is created",
        {"spec.storage.run": {"claimName": "mine", "size": "1Gi"}},
        valid={"spec.storage.run": {"claimName": "mine"}},
    ),
    Broken(
        "spec.storage.run.claimName",
        "size, storageClassName and accessMode apply to a claim that is created",
        {"spec.storage.run": {"claimName": "mine", "accessMode": "ReadWriteMany"}},
    ),
    Broken(
        "spec.storage.run.keep",
        "an existing claim is never deleted",
        {"spec.storage.run": {"claimName": "mine", "keep": False}},
        valid={"spec.storage.run": {"keep": False}},
    ),
    Broken("spec.timeouts.startup", "pods need at least one minute", {"spec.timeouts.startup": "30s"}),
    Broken(
        "spec.timeouts.hang", "with less than one", {"spec.timeouts.hang": "59s"}, valid={"spec.timeouts.hang": "1h1m"}
    ),
    Broken(
        "spec.podTemplate.labels",
        "app.kubernetes.io/, finetune.dev/",
        {"spec.podTemplate.labels": {"app.kubernetes.io/name": "x"}},
        valid={"spec.podTemplate.labels": {"team": "x"}},
    ),
    Broken(
        "spec.podTemplate.annotations",
        "app.kubernetes.io/, finetune.dev/",
        {"spec.podTemplate.annotations": {"finetune.dev/retry": "x"}},
    ),
    Broken(
        "spec.podTemplate.env",
        "FINETUNE_*, PET_*",
        {"spec.podTemplate.env": [{"name": "LOCAL_RANK", "value": "1"}]},
        valid={"spec.podTemplate.env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "FRANK", "value": "x"}]},
    ),
    *(
        Broken(
            "spec.podTemplate.env",
            "a token in env",
            {"spec.podTemplate.env": [{"name": name, "value": "secret"}]},
            valid={"spec.podTemplate.env": [{"name": "HF_HUB_DISABLE_IMPLICIT_TOKEN", "value": "1"}]},
        )
        for name in (
            "HF_TOKEN",
            "hf_token",
            "HF_TOKEN_PATH",
            "HUGGINGFACEHUB_API_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
        )
    ),
    Broken(
        "spec.podTemplate.resources.limits",
        "GPUs are set in topology",
        {"spec.podTemplate.resources.limits": {"nvidia.com/gpu": 4}},
        valid={"spec.podTemplate.resources.limits": {"cpu": 8, "memory": "64Gi", "rdma/ib": "1"}},
    ),
    Broken(
        "spec.podTemplate.resources.requests",
        "GPUs are set in topology",
        {"spec.podTemplate.resources.requests": {"nvidia.com/gpu": "4"}},
    ),
    *(
        Broken(
            f"spec.podTemplate.cpuResources.{kind}",
            "GPUs are set in topology",
            {f"spec.podTemplate.cpuResources.{kind}": {"nvidia.com/gpu": "4"}},
            valid={f"spec.podTemplate.cpuResources.{kind}": {"memory": "64Gi"}},
        )
        for kind in ("requests", "limits")
    ),
    Broken(
        "spec.podTemplate.resources.limits",
        "only whole NVIDIA GPUs",
        {"spec.podTemplate.resources.limits": {"nvidia.com/mig-3g.20gb": 1, "amd.com/gpu": 8}},
    ),
    *(
        Broken(
            f"spec.podTemplate.{field}",
            "only whole NVIDIA GPUs",
            {f"spec.podTemplate.{field}": {name: 1}},
        )
        for field, name in (
            ("resources.requests", "nvidia.com/mig-1g.5gb"),
            ("resources.requests", "nvidia.com/gpu.shared"),
            ("cpuResources.requests", "amd.com/gpu"),
            ("cpuResources.limits", "gpu.intel.com/i915"),
        )
    ),
    _fixed("model", {"spec.model.path": "models/other"}),
    _fixed("datasets", {"spec.datasets.0.weight": 2}),
    _fixed("split", {"spec.split.seed": 7}),
    _fixed("tuning", {"spec.tuning.lora.rank": 8}),
    _fixed("training", {"spec.training.epochs": 3}),
    _fixed("checkpoint", {"spec.checkpoint.keep": 9}),
    _fixed("storage", {"spec.storage.run.size": "1Gi"}),
    _fixed("evaluation", {"spec.evaluation.fewShot": 2}),
    _fixed("publish", {"spec.publish.repo": "a/b"}),
    _fixed("publish", {}, {"spec.publish.repo": "a/b"}),
    _fixed("tracking", {"spec.tracking.wandb.project": "p"}),
    _fixed("image", {"spec.image": "trainer:2"}, {"spec.image": "trainer:1"}),
    _fixed("imagePullSecrets", {"spec.imagePullSecrets": [{"name": "pull"}]}),
    Broken(
        "spec.topology",
        "topology can change only while the job is suspended",
        {"spec.topology.nodes": 2, "spec.suspend": True},
        before={},
    ),
    Broken(
        "spec.podTemplate",
        "podTemplate can change only while the job is suspended",
        {"spec.podTemplate.queueName": "q"},
        before={},
    ),
)

CHANGES_ALLOWED: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {"spec.suspend": True}),
    ({}, {"spec.retry.limit": 9}),
    ({}, {"spec.timeouts.hang": "2h"}),
    ({}, {"spec.cleanup.ttlSecondsAfterFinished": 60}),
    ({}, {"spec.credentials.hub.name": "other"}),
    ({"spec.suspend": True}, {"spec.suspend": True, "spec.topology.nodes": 4}),
    ({"spec.suspend": True}, {"spec.topology.nodes": 4}),
    ({"spec.suspend": True}, {"spec.suspend": True, "spec.podTemplate.queueName": "q"}),
)
"""What a job was made with, and what it may be changed to."""
