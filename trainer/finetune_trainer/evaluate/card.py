"""The model card: what it is, how good it is, where it comes from, how to load and reproduce it.

Made from the run directory alone and the same every time, so that publishing twice is one commit. Nothing of the
data's rows, no path of this machine and no secret may enter it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader

from finetune_api import INSTALL
from finetune_api.report import MetricResult, Results
from finetune_api.runconfig import RunConfig, reproduced
from finetune_api.spec import Dataset, FineTuneJobSpec
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.evaluate.baselines import WORDS
from finetune_trainer.evaluate.bootstrap import STATEMENT
from finetune_trainer.evaluate.gate import MACRO
from finetune_trainer.evaluate.metrics import LOWER_IS_BETTER
from finetune_trainer.files import ADAPTER_CONFIG
from finetune_trainer.prepare.readme import LONGEST_HEAD_CHARACTERS, head_of

HERE = Path(__file__).parent
CARD_FILE = "README.md"
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,64}")
_LICENSE = re.compile(r"[0-9A-Za-z.+-]{1,64}")

METRIC_TYPES = {"rouge-l": "rouge", "rouge-1": "rouge", "rouge-2": "rouge", "exact-match": "exact_match"}
METRIC_TYPES |= {"macro-f1": "f1", "neg-loss": "loss"}


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card is written from."""

    config: RunConfig
    manifest: PreparedManifest
    results: Results
    origin: Mapping[str, Any]
    """`Report.origin` of Evaluate."""
    export: Path
    license: str | None = None


def model_card(facts: CardFacts) -> str:
    """The whole README.md, with metadata for the Hub."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    environment.filters["code"] = code
    body = environment.get_template("card.md.j2").render(**_view(facts))
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}"


def base_license(directory: Path) -> str | None:
    """Licence in the metadata of the base model's own card, if it lies beside the weights; not ours to trust."""
    try:
        with (directory / CARD_FILE).open(encoding="utf-8", errors="replace") as file:
            head = yaml.safe_load(head_of(file.read(LONGEST_HEAD_CHARACTERS)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    found = head.get("license") if isinstance(head, dict) else None
    return found if isinstance(found, str) and _LICENSE.fullmatch(found) else None


# -- metadata ---------------------------------------------------------------------------------------------------


def _metadata(facts: CardFacts) -> ModelCardData:
    spec = facts.config.spec
    adapter = is_adapter(facts.export)
    known: dict[str, Any] = {}
    if spec.model.repo:
        known |= {"base_model": spec.model.repo, "base_model_relation": "adapter" if adapter else "finetune"}
    datasets = [dataset.repo for dataset in spec.datasets if dataset.repo]
    return ModelCardData(
        license=facts.license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({"finetune-operator", "fine-tuned", spec.tuning.method.value}),
        datasets=datasets or None,
        metrics=sorted({METRIC_TYPES.get(m.metric, m.metric) for m in facts.results.metrics if m.dataset != MACRO}),
        model_name=facts.config.job.name,
        eval_results=[_eval_result(facts, m) for m in facts.results.metrics if m.dataset != MACRO],
        **known,
    )


def _eval_result(facts: CardFacts, metric: MetricResult) -> EvalResult:
    prepared = facts.manifest.dataset(metric.dataset)
    dataset = next(each for each in facts.config.spec.datasets if each.name == metric.dataset)
    return EvalResult(
        task_type=prepared.task.traits.hub_task,
        task_name=prepared.task.traits.title,
        dataset_type=dataset.repo or metric.dataset,
        dataset_name=metric.dataset,
        dataset_config=dataset.config,
        dataset_split=facts.results.split,
        dataset_revision=_commit(prepared.source) or None,
        metric_type=METRIC_TYPES.get(metric.metric, metric.metric),
        metric_name="loss" if metric.metric == "neg-loss" else metric.metric,
        metric_value=round(-metric.tuned if metric.metric == "neg-loss" else metric.tuned, 6),
        verified=False,
    )


def _commit(source: str) -> str:
    """The commit in `owner/name@commit`."""
    found = re.search(r"@([0-9a-f]{7,40})\b", source)
    return found[1] if found else ""


def is_adapter(export: Path) -> bool:
    """Whether the export needs a base model to be loaded on."""
    return (export / ADAPTER_CONFIG).exists()


# -- body -------------------------------------------------------------------------------------------------------


def _view(facts: CardFacts) -> dict[str, Any]:
    spec, results = facts.config.spec, facts.results
    primary = [m for m in results.metrics if m.primary and m.dataset != MACRO]
    base = spec.model.repo or Path(spec.model.path or "").name
    return {
        "name": facts.config.job.name,
        "adapter": is_adapter(facts.export),
        "quantized": bool(facts.origin.get("quantized")),
        "quantization": spec.tuning.quantization,
        "base": base,
        "base_repo": spec.model.repo,
        "repo": (spec.publish.repo if spec.publish else None) or "path/to/this/directory",
        "method": spec.tuning.method.value,
        "gate": results.gate,
        "split": results.split,
        "statement": STATEMENT,
        "lines": [_line(m) for m in _without_lone_macro(results.metrics)],
        "baselines": [_baseline(m, who, v) for m in primary for who, v in m.baselines.items()],
        "stronger": [_baseline(m, who, v) for m in primary for who, v in m.baselines.items() if v > m.tuned],
        "data": [_data(facts, dataset) for dataset in spec.datasets],
        "training": _training(spec),
        "lora": spec.tuning.lora if spec.tuning.method.traits.low_rank else None,
        "origin": _origin(facts),
        "job": reproducible_job(facts),
        "operator_version": _versions(facts.origin).get("finetune-operator", ""),
        "install": INSTALL.format(extra="trainer"),
        "few": min((m.rows for m in primary), default=0),
    }


def _line(metric: MetricResult) -> dict[str, Any]:
    difference = metric.difference
    verdict = ""
    if difference is not None:
        sign = -1 if metric.metric in LOWER_IS_BETTER else 1
        ends = sorted((sign * difference.low, sign * difference.high))
        verdict = "better" if ends[0] > 0 else "worse" if ends[1] < 0 else "not significant"
    return {"m": metric, "verdict": verdict, "macro": metric.dataset == MACRO}


def _without_lone_macro(metrics: Sequence[MetricResult]) -> list[MetricResult]:
    lone = sum(m.primary for m in metrics) == 2
    return [m for m in metrics if not (lone and m.dataset == MACRO)]


def _baseline(metric: MetricResult, who: str, value: float) -> dict[str, Any]:
    return {
        "dataset": metric.dataset,
        "metric": metric.metric,
        "who": WORDS.get(who, who),
        "value": value,
        "tuned": metric.tuned,
    }


def _data(facts: CardFacts, dataset: Dataset) -> dict[str, Any]:
    prepared = facts.manifest.dataset(dataset.name)
    return {
        "name": dataset.name,
        "source": public_source(prepared.source, dataset.path),
        "task": prepared.task.value,
        "train": prepared.train,
        "validation": prepared.validation,
        "test": prepared.test,
        "notes": prepared.notes,
    }


def public_source(source: str, path: str | None) -> str:
    """A source without the directories of the machine it was read on."""
    return source.replace(path, Path(path).name) if path else source


def _training(spec: FineTuneJobSpec) -> list[tuple[str, str]]:
    training, lora = spec.training, spec.tuning.lora
    lines = [("Method", spec.tuning.method.value)]
    if spec.tuning.method.traits.low_rank:
        lines.append(("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {lora.target_modules}"))
        kinds = [
            name for name, on in (("DoRA", lora.dora), ("rsLoRA", lora.rslora), ("PiSSA", lora.init == "pissa")) if on
        ]
        lines += [("Variants", ", ".join(kinds))] if kinds else []
    if spec.tuning.method.traits.four_bit:
        quantization = spec.tuning.quantization
        double = ", double quantisation" if quantization.double_quant else ""
        lines.append(("Base in training", f"4-bit {quantization.type}{double}"))
    lines += [
        ("Epochs", f"{training.epochs:g}"),
        (
            "Learning rate",
            f"{training.learning_rate:g}, {training.scheduler.type}, warm-up {training.scheduler.warmup_ratio:g}",
        ),
        ("Global batch size", f"{training.global_batch_size:,} examples"),
        ("Maximum sequence length", f"{training.max_sequence_length:,} tokens"),
        ("Seeds", f"training {training.seed}, split {spec.split.seed}"),
    ]
    return lines


def _origin(facts: CardFacts) -> list[tuple[str, str]]:
    model = facts.manifest.model
    base = f"{model.source}@{model.commit}" if model.commit else f"{Path(model.source).name} (sha256 {model.digest})"
    lines = [("Base model", base)]
    if model.adapter_source:
        adapter = facts.config.spec.model.adapter
        lines.append(("Starting adapter", public_source(model.adapter_source, adapter.path if adapter else None)))
    lines += [(f"Dataset {d['name']}", d["source"]) for d in (_data(facts, x) for x in facts.config.spec.datasets)]
    lines += [
        ("Prepared data", facts.manifest.digest),
        ("Published files", facts.results.export_digest),
        ("Image", facts.config.image or "local processes"),
        ("Evaluated in", str(facts.origin.get("precision", ""))),
        ("Device", str(facts.origin.get("device", ""))),
    ]
    lines += _versions(facts.origin).items()
    return [(name, text) for name, text in lines if text]


def _versions(origin: Mapping[str, Any]) -> dict[str, str]:
    """Versions by package; what does not look like one is left out, because one of them stands among commands."""
    found = origin.get("versions")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {str(name): text for name, text in pairs if isinstance(text, str) and _VERSION.fullmatch(text)}


def reproducible_job(facts: CardFacts) -> str:
    """The job with every revision pinned to the commit that was used, as YAML."""
    kept = reproduced(facts.config.spec, exclude_defaults=True)
    model = facts.manifest.model
    _pin(kept["model"], model.commit)
    if "adapter" in kept["model"]:
        _pin(kept["model"]["adapter"], _commit(model.adapter_source))
    for dataset in kept["datasets"]:
        _pin(dataset, _commit(facts.manifest.dataset(dataset["name"]).source))
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": facts.config.job.name},
        "spec": kept,
    }
    return str(yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=100))


def _pin(source: dict[str, Any], commit: str) -> None:
    if "path" in source:
        source["path"] = Path(source["path"]).name
        source.pop("revision", None)
    elif commit:
        source["revision"] = commit


# -- text -------------------------------------------------------------------------------------------------------

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


def plain(text: object) -> str:
    """Words of a stranger in Markdown: shown as they are, on one line, never as markup."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """The same as inline code, also inside a table."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`"
