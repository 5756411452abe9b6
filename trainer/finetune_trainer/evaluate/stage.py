"""The Evaluate stage: export and base answer the same held-out rows; results, predictions and a page are written.

No FSDP: each process holds a replica and takes a share of the rows. Nothing here may change `export/`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.base import Stage
from finetune_api.files import write_json
from finetune_api.report import Digests, FailureClass, Progress, Report, Results
from finetune_api.traits import Scoring, Task
from finetune_trainer.context import RunContext
from finetune_trainer.data.evaluation_rows import EvaluationRow, read_baseline, read_evaluation
from finetune_trainer.data.manifest import MANIFEST_FILE, PreparedManifest
from finetune_trainer.digest import export_digest, refuse_other
from finetune_trainer.evaluate import baselines
from finetune_trainer.evaluate.answers import AnswerSettings, answer_rows, closed
from finetune_trainer.evaluate.bootstrap import STATEMENT
from finetune_trainer.evaluate.card import CardFacts, base_license, model_card
from finetune_trainer.evaluate.compare import DatasetAnswers, MetricComparison, compare
from finetune_trainer.evaluate.export_check import check_export
from finetune_trainer.evaluate.final_answer import AnswerReader
from finetune_trainer.evaluate.gate import decide_gate
from finetune_trainer.evaluate.generation import THOUGHT_FACTOR, greedy_answers
from finetune_trainer.evaluate.likelihood import Budget, has_virtual_tokens, tree_disagreement
from finetune_trainer.evaluate.metrics import EXTRA, Answer
from finetune_trainer.evaluate.models import ModelPair, Variant, fits_on_one_device, model_pair, opened_both
from finetune_trainer.evaluate.page.build import PromptAnswers, ReportData, write_page
from finetune_trainer.evaluate.ranks import Ranks
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import ADAPTER_CONFIG, sha256_of
from finetune_trainer.model.device import choose_device, choose_precision
from finetune_trainer.reports import RESULTS_FILE, read_metrics, read_reports
from finetune_trainer.versions import versions

log = logging.getLogger(__name__)

SAMPLES = 3
"""Held-out prompts per dataset that both models answer for the page."""
CPU_BUDGET = Budget(tokens=2048, logits=64_000_000)
GPU_BUDGET = Budget(tokens=32_768, logits=1_000_000_000)
TREE_TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-2, torch.bfloat16: 1.0, torch.float16: 0.5}
"""Largest difference in a summed log-probability between both ways of scoring; a leak gives far more."""

Key = tuple[str, str]
"""Who answered (`tuned`, `base`, `few-shot`) and to which dataset."""


@dataclass
class EvaluationInputs:
    """What the models have to answer."""

    manifest: PreparedManifest
    rows: dict[str, list[EvaluationRow]]
    prompts: list[str]
    """`evaluation.prompts`."""
    few_shot: bool
    own: dict[str, list[int]] = field(default_factory=dict)
    """Rows of each dataset that this rank answers."""


def run(context: RunContext) -> None:
    """Compare `export/` with what it started from and decide whether it is better."""
    spec = context.config.spec
    with Ranks(context.rank, context.world_size) as ranks:
        context.reporter.activity("reading the held-out rows")
        manifest = _manifest(context)
        digest = _digest_of_export(context)
        pair = _model_pair(context, manifest, ranks)
        inputs = _inputs(context, manifest)
        if pair.device_map and ranks.rank:
            inputs.own = {name: [] for name in inputs.rows}
        else:
            alone = Ranks(0, 1) if pair.device_map else ranks
            inputs.own = {name: alone.share([_size(row) for row in rows]) for name, rows in inputs.rows.items()}
        answers, prompted = _all_answers(context, pair, inputs, digest)
        everyone = ranks.gather(answers)
        if ranks.rank:
            return
    _for_readers(pair, inputs)
    answered = _put_together(inputs, everyone, baseline=spec.evaluation.baseline)
    context.reporter.activity("comparing")
    _add_baselines(context, answered)
    compared = compare(answered, spec.evaluation.metrics)
    _warn_of_metrics_without_effect(context, manifest)
    _report_thoughts(context, answered)
    metrics = [one.result for one in compared]
    gate = decide_gate(spec.evaluation.gate, metrics, baseline=spec.evaluation.baseline)
    results = Results(split=manifest.evaluation_split, metrics=metrics, gate=gate, export_digest=digest)
    data = ReportData(
        context.config,
        manifest,
        results,
        answered,
        compared,
        prompted,
        _reports(context),
        read_metrics(context.metrics_file),
        _origin(context, manifest, pair, digest),
        datetime.now(UTC),
    )
    _write(context, data)
    digests = Digests(results=sha256_of(context.evaluation / RESULTS_FILE))
    context.reporter.done(results=results, origin=data.origin, digests=digests)
    log.info("%s", gate.sentence)


# -- inputs ---------------------------------------------------------------------------------------------------


def _manifest(context: RunContext) -> PreparedManifest:
    try:
        return PreparedManifest.read(context.prepared, context.attempt.digests.prepared)
    except (OSError, ValueError) as error:
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"The prepared data cannot be read ({type(error).__name__}): run the Prepare stage again.",
            str(context.prepared / MANIFEST_FILE),
        ) from error


def _digest_of_export(context: RunContext) -> str:
    if not (context.export / "config.json").exists() and not (context.export / ADAPTER_CONFIG).exists():
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"There is no exported model in {context.export}: the Train stage has to finish first.",
            "export",
        )
    if context.rank:
        return ""
    digest = export_digest(context.export)
    refuse_other("export", digest, context.attempt.digests.export, Stage.TRAIN)
    return digest


def _model_pair(context: RunContext, manifest: PreparedManifest, ranks: Ranks) -> ModelPair:
    spec = context.config.spec
    device = choose_device(context.local_rank, context.gpus_per_node)
    dtype, choice = choose_precision(spec.training.precision, device)
    context.reporter.choose("evaluation.precision", choice.value, choice.why)
    compute = spec.tuning.quantization.compute_dtype
    pair = model_pair(
        manifest,
        context.export,
        spec.tuning.method,
        dtype,
        device,
        compute_dtype=dtype if compute == "auto" else getattr(torch, compute),
        trust_remote_code=spec.model.trust_remote_code,
    )
    weights = pair.base_directory if pair.is_adapter else pair.export
    if fits_on_one_device(weights, dtype, device):
        return pair
    context.reporter.choose("evaluation.devices", "spread", "the weights do not fit on one GPU of this node")
    return replace(pair, device_map="auto")


def _inputs(context: RunContext, manifest: PreparedManifest) -> EvaluationInputs:
    spec = context.config.spec
    rows = {}
    for dataset in manifest.datasets:
        path = context.prepared / "evaluation" / f"{dataset.name}.jsonl"
        rows[dataset.name] = _drawn(
            list(read_evaluation(path)) if path.exists() else [], spec.evaluation.max_rows, spec.split.seed
        )
        if not rows[dataset.name]:
            context.reporter.warn(f"Dataset {dataset.name} has no held-out rows, so it is not evaluated.")
    few_shot = any(row.few_shot_prompt_ids for of_one in rows.values() for row in of_one[:1])
    return EvaluationInputs(manifest, rows, spec.evaluation.prompts, few_shot)


def _drawn(rows: list[EvaluationRow], max_rows: int | None, seed: int) -> list[EvaluationRow]:
    """At most `max_rows` rows, drawn with the seed, in their own order."""
    if max_rows is None or len(rows) <= max_rows:
        return rows
    chosen = np.random.default_rng(seed).permutation(len(rows))[:max_rows]
    return [rows[i] for i in sorted(chosen.tolist())]


def _size(row: EvaluationRow) -> int:
    return len(row.prompt_ids) + len(row.ids) + sum(len(ids) for ids in row.candidate_ids or ())


# -- answers ----------------------------------------------------------------------------------------------------


def _all_answers(
    context: RunContext, pair: ModelPair, inputs: EvaluationInputs, digest: str
) -> tuple[dict[Key, list[tuple[int, Answer]]], list[PromptAnswers]]:
    """This rank's answers by who and dataset, and the free prompts as answered by both (rank 0)."""
    from transformers import AutoTokenizer

    spec = context.config.spec
    answers: dict[Key, list[tuple[int, Answer]]] = {}
    prompted: dict[Variant, list[str]] = {}
    if pair.device_map and context.rank:
        return answers, []
    tokenizer: Any = AutoTokenizer.from_pretrained(pair.export, trust_remote_code=pair.trust_remote_code)
    reader = AnswerReader(tokenizer)
    prompts = _prompts_to_answer(reader, inputs)
    progress = _RowProgress(context, inputs, variants=(2 if spec.evaluation.baseline else 1) + inputs.few_shot)
    context.reporter.activity("loading the model")
    something = bool(inputs.prompts) or any(inputs.rows.values())
    for variant, model in opened_both(pair, base=spec.evaluation.baseline and something):
        settings = _settings(context, variant, model, inputs, pair)
        if variant == "tuned" and context.rank == 0:
            check_export(context, pair, model, digest, settings.budget)
        few_shots = (False, True) if variant == "base" and inputs.few_shot else (False,)
        for few_shot in few_shots:
            who = baselines.FEW_SHOT if few_shot else variant
            context.reporter.activity(f"scoring the {'base model with examples' if few_shot else variant + ' model'}")
            for name, rows in inputs.rows.items():
                own = inputs.own[name]
                given = answer_rows(
                    model, reader, [rows[i] for i in own], settings, few_shot=few_shot, done=progress.add
                )
                answers[who, name] = list(zip(own, given, strict=True))
        if context.rank == 0 and prompts:
            prompted[variant] = _answers_to_prompts(model, reader, list(prompts.values()), settings)
    both = zip(prompts, prompted.get("base", [None] * len(prompts)), prompted.get("tuned", []), strict=False)
    return answers, [PromptAnswers(prompt, base, tuned) for prompt, base, tuned in both]


def _settings(
    context: RunContext, variant: Variant, model: Any, inputs: EvaluationInputs, pair: ModelPair
) -> AnswerSettings:
    """How this model is scored: the faster way only where it agrees with the plain one."""
    budget = GPU_BUDGET if pair.device.type == "cuda" else CPU_BUDGET
    settings = AnswerSettings(context.config.spec.evaluation.max_new_tokens, budget)
    rows = [closed(row) for of_one in inputs.rows.values() for row in of_one[:1] if row.candidate_ids]
    if not rows:
        return settings
    if has_virtual_tokens(model):
        trees, why = False, "a soft prompt or prefix precedes the input"
    else:
        difference = tree_disagreement(model, rows)
        trees = difference <= TREE_TOLERANCE[pair.dtype]
        why = f"differs from one sequence per candidate by {difference:.2g}"
    context.reporter.choose(f"evaluation.scoring.{variant}", "tree" if trees else "one sequence per candidate", why)
    return AnswerSettings(settings.max_new_tokens, budget, trees)


def _prompts_to_answer(reader: AnswerReader, inputs: EvaluationInputs) -> dict[str, list[int]]:
    """The free prompts, and the first held-out prompts of tasks whose answers are written but not scored as texts."""
    decode = partial(reader.chat.tokenizer.decode, skip_special_tokens=True)
    prompts = {prompt: reader.chat.prompt([{"role": "user", "content": prompt}])[1] for prompt in inputs.prompts}
    for dataset in inputs.manifest.datasets:
        if dataset.task.traits.form == "question" and dataset.task.traits.scoring is Scoring.LIKELIHOOD:
            for row in inputs.rows[dataset.name][:SAMPLES]:
                ids = row.ids[: row.target_position[0] + 1]
                prompts[f"{row.id}: {decode(ids)}\n\nIn the data: {decode(row.target_id)}"] = ids
    return prompts


def _answers_to_prompts(
    model: Any, reader: AnswerReader, prompts: Sequence[Sequence[int]], settings: AnswerSettings
) -> list[str]:
    answers = greedy_answers(
        model,
        reader,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        tokens_per_batch=4 * settings.budget.tokens,
    )
    return ["(a thought without an end)" if a.thought == "unfinished" else a.text for a in answers]


class _RowProgress:
    """Rows answered so far by all ranks, estimated from this one's."""

    def __init__(self, context: RunContext, inputs: EvaluationInputs, variants: int) -> None:
        self._context = context
        self._total = variants * sum(len(rows) for rows in inputs.rows.values())
        own = variants * sum(len(rows) for rows in inputs.own.values())
        self._rows_per_own_row = self._total / own if own else 1.0
        self._done = 0
        self._start = time.monotonic()

    def add(self, rows: int) -> None:
        self._done += rows
        step = min(self._total, round(self._done * self._rows_per_own_row))
        left = (time.monotonic() - self._start) * (self._total - step) / step if step else None
        self._context.reporter.progress(
            Progress(step=step, total=self._total, unit="rows", eta_seconds=None if left is None else round(left))
        )


# -- results ----------------------------------------------------------------------------------------------------


def _for_readers(pair: ModelPair, inputs: EvaluationInputs) -> None:
    """Give rows that came as tokens their text, and references the form in which they are compared."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(pair.export, trust_remote_code=pair.trust_remote_code)
    reader = AnswerReader(tokenizer)
    for name, rows in inputs.rows.items():
        inputs.rows[name] = [
            replace(row, text=tokenizer.decode(row.ids))
            if row.ids
            else replace(row, answers=[reader.reference(answer) for answer in row.answers])
            for row in rows
        ]


def _put_together(
    inputs: EvaluationInputs, everyone: Sequence[dict[Key, list[tuple[int, Answer]]]], *, baseline: bool
) -> list[DatasetAnswers]:
    whole: dict[Key, dict[int, Answer]] = {}
    for answers in everyone:
        for key, pairs in answers.items():
            whole.setdefault(key, {}).update(pairs)

    def of(who: str, name: str) -> list[Answer]:
        found = whole[who, name]
        return [found[i] for i in range(len(inputs.rows[name]))]

    answered = []
    for dataset in inputs.manifest.datasets:
        rows = inputs.rows[dataset.name]
        if not rows:
            continue
        few_shot = baseline and any(row.few_shot_prompt_ids for row in rows)
        answered.append(
            DatasetAnswers(
                dataset.name,
                dataset.task,
                rows,
                of("tuned", dataset.name),
                of("base", dataset.name) if baseline else None,
                {baselines.FEW_SHOT: of(baselines.FEW_SHOT, dataset.name)} if few_shot else {},
            )
        )
    return answered


def _add_baselines(context: RunContext, answered: Sequence[DatasetAnswers]) -> None:
    for dataset in answered:
        path = context.prepared / "baseline" / f"{dataset.name}.jsonl"
        if dataset.task.traits.has_labels and path.exists():
            dataset.baselines.update(baselines.classification_baselines(list(read_baseline(path)), dataset.rows))


def _warn_of_metrics_without_effect(context: RunContext, manifest: PreparedManifest) -> None:
    tasks = {dataset.task for dataset in manifest.datasets}
    measured = {name for task in tasks for name in task.traits.metrics}
    for metric in context.config.spec.evaluation.metrics:
        names, scorings = EXTRA[metric]
        of_tasks = {task for task in Task if task.traits.scoring in scorings}
        if not tasks & of_tasks and not set(names) & measured:
            tasks_of_metric = ", ".join(sorted(of_tasks))
            context.reporter.warn(
                f"evaluation.metrics: {metric} applies only to {tasks_of_metric}; this job has no such dataset."
            )


def _report_thoughts(context: RunContext, answered: Sequence[DatasetAnswers]) -> None:
    """Say which answers came after thoughts, and which did not come because a thought did not end."""
    most = context.config.spec.evaluation.max_new_tokens
    for dataset in answered:
        for who, answers in dataset.everybody.items():
            thoughts = [answer.thought for answer in answers if answer.thought != "none"]
            if not thoughts:
                continue
            context.reporter.choose(
                f"evaluation.thoughts.{dataset.name}.{who}",
                f"{THOUGHT_FACTOR * most:,} more tokens",
                f"{len(thoughts):,} of {len(answers):,} answers begin with a thought, which is not scored",
            )
            unfinished = thoughts.count("unfinished")
            if unfinished:
                context.reporter.warn(
                    f"{unfinished:,} of {len(answers):,} answers to {dataset.name} ({who}) were still a thought after "
                    f"{(1 + THOUGHT_FACTOR) * most:,} tokens and are scored as empty: raise evaluation.maxNewTokens."
                )


def _reports(context: RunContext) -> list[tuple[int, Report]]:
    """All reports so far; this attempt's own as it stands now."""
    earlier = [(n, report) for n, report in read_reports(context.reports) if report.attempt != context.attempt.id]
    return [*earlier, (context.attempt.number, context.reporter.report)]


def _write(context: RunContext, data: ReportData) -> None:
    context.evaluation.mkdir(parents=True, exist_ok=True)
    write_json(context.evaluation / "details.json", _details(data.compared))
    aside = context.evaluation / ".predictions.jsonl"
    with aside.open("w", encoding="utf-8") as file:
        for dataset in data.answered:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(dataset))
    aside.replace(context.evaluation / "predictions.jsonl")
    write_page(context.evaluation / "report.html", data)
    licence = base_license(Path(data.manifest.model.directory))
    card = model_card(CardFacts(context.config, data.manifest, data.results, data.origin, context.export, licence))
    (context.evaluation / "model-card.md").write_text(card, encoding="utf-8")
    # Last: whoever finds the results finds everything else.
    write_json(context.evaluation / RESULTS_FILE, data.results.to_wire())


def _details(compared: Sequence[MetricComparison]) -> dict[str, Any]:
    lines = [
        {
            "dataset": one.result.dataset,
            "metric": one.result.metric,
            "rows": one.result.rows,
            "primary": one.result.primary,
            "values": {who: value.to_wire() for who, value in one.values.items()},
            "tunedMinus": {who: value.to_wire() for who, value in one.advantage.items()},
        }
        for one in compared
    ]
    return {"intervals": STATEMENT, "metrics": lines}


def _predictions(dataset: DatasetAnswers) -> list[dict[str, Any]]:
    lines = []
    for index, row in enumerate(dataset.rows):
        base = dataset.base[index] if dataset.base is not None else None
        line: dict[str, Any] = {"id": row.id, "dataset": dataset.name, "prompt": row.prompt or row.text}
        line["gold"] = row.candidates[row.gold or 0] if row.candidates else (row.answers or None)
        line["base"], line["tuned"] = _format_answer(base), _format_answer(dataset.tuned[index])
        line |= {name: _format_answer(answers[index]) for name, answers in dataset.baselines.items()}
        lines.append(line)
    return lines


def _format_answer(answer: Answer | None) -> dict[str, Any] | str | None:
    if answer is None:
        return None
    if answer.scores:
        return {"answer": answer.text, "scores": [round(score, 5) for score in answer.scores]}
    if answer.tokens:
        return {"loss": answer.nll / answer.tokens, "tokens": answer.tokens}
    return answer.text


def _origin(context: RunContext, manifest: PreparedManifest, pair: ModelPair, digest: str) -> dict[str, Any]:
    model = manifest.model
    return {
        "model": f"{model.source}@{model.commit}" if model.commit else f"{model.source} sha256:{model.digest}",
        "datasets": {dataset.name: dataset.source for dataset in manifest.datasets},
        "prepared": manifest.digest,
        "export": digest,
        "precision": str(pair.dtype).removeprefix("torch."),
        "quantized": pair.is_adapter and pair.method.traits.four_bit,
        "device": torch.cuda.get_device_name() if pair.device.type == "cuda" else "cpu",
        "ranks": context.world_size,
        "intervals": STATEMENT,
        "seed": context.config.spec.training.seed,
        "splitSeed": context.config.spec.split.seed,
        "versions": versions(),
    }
