"""Run directories as Train leaves them: a tiny base model, held-out rows, and an adapter that has learnt something."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.support.jobs import job
from tests.support.tiny import tiny_llama

from finetune_api.base import Stage
from finetune_api.files import write_json
from finetune_api.report import Choice, DatasetFacts, Digests, ExportRef, MemoryComponent, Plan, Report
from finetune_api.runconfig import Attempt, JobRef, Paths, RunConfig, resolve
from finetune_api.traits import Task
from finetune_trainer import export as exporting
from finetune_trainer.context import RunContext
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.evaluation_rows import BaselineRow, EvaluationRow, json_line
from finetune_trainer.data.manifest import PreparedDataset, PreparedManifest, PreparedModel, Span
from finetune_trainer.digest import export_digest
from finetune_trainer.reporter import Reporter

LABELS = ["bad", "good", "so so"]
WORDS = {"bad": ["rain", "cold", "late"], "good": ["sun", "warm", "free"], "so so": ["fog", "mild", "slow"]}


@dataclass(frozen=True)
class EvaluationRun:
    """One run directory and how to take part in it."""

    config: RunConfig
    manifest: PreparedManifest

    @property
    def path(self) -> Path:
        return Path(self.config.paths.run)

    def context(
        self, stage: Stage = Stage.EVALUATE, *, tokens: Path | None = None, number: int = 1, **digests: str
    ) -> RunContext:
        """The context of a single process of that stage. digests: what earlier stages reported."""
        attempt = Attempt(uid=self.config.job.uid, stage=stage, number=number, digests=Digests.model_validate(digests))
        reporter = Reporter(attempt, self.path / "reports", enabled=True)
        return RunContext(self.config, attempt, reporter, tokens=tokens)

    def report(self, stage: Stage = Stage.EVALUATE) -> Report:
        """What the first attempt at a stage reported."""
        return Report.model_validate_json((self.path / "reports" / f"{stage}-1.json").read_text())

    def environment(self, stage: Stage = Stage.EVALUATE) -> dict[str, str]:
        """Environment of a process of that stage."""
        attempt = Attempt(uid=self.config.job.uid, stage=stage)
        return {
            "FINETUNE_RUN_CONFIG": str(self.path / "run-config.json"),
            "FINETUNE_ATTEMPT": attempt.model_dump_json(by_alias=True),
        }


def evaluation_run(
    root: Path,
    *,
    tasks: Sequence[Task] = (Task.CLASSIFICATION,),
    rows: int = 60,
    changes: Mapping[str, Any] | None = None,
    steps: int = 60,
    few_shot: int = 0,
    seed: int = 0,
) -> EvaluationRun:
    """A run directory ready for Evaluate. `steps` of LoRA on training rows of the same kind; 0 leaves it untrained.

    changes: as `tests.support.jobs.manifest` takes them.
    """
    base = _able_to_be_sure(tiny_llama(root / "base", hidden=48, heads=4))
    chat = ChatFormat(_tokenizer(base))
    data_random = random.Random(seed)
    datasets, training = [], []
    for index, task in enumerate(tasks):
        name = task.value
        train = [_example(task, data_random) for _ in range(96)]
        held_out = [_row(task, name, i, _example(task, data_random), chat) for i in range(rows)]
        if few_shot:
            shown = [turn for text, _, answer in train[:few_shot] for turn in _turns(text, answer)]
            held_out = [row if row.ids else _with_examples(row, shown, chat) for row in held_out]
        _write_rows(root / "run/prepared/evaluation" / f"{name}.jsonl", held_out)
        if task is Task.CLASSIFICATION:
            known = [BaselineRow(text, answer, used=i < 64) for i, (text, _, answer) in enumerate(train)]
            _write_rows(root / "run/prepared/baseline" / f"{name}.jsonl", known)
        training += [_training_ids(task, example, chat) for example in train]
        labels = LABELS if task is Task.CLASSIFICATION else []
        facts = {"index": index, "name": name, "task": task, "labels": labels, "source": f"{name}.csv (sha256 0123)"}
        datasets.append(PreparedDataset(**facts, train=96, validation=0, test=rows))
    manifest = _manifest(root / "run/prepared", base, datasets, chat)
    config = _config(root, tasks, changes)
    _export(root / "run/export", base, training, steps)
    run = EvaluationRun(config, manifest)
    _history(run)
    return run


def evaluated_run(root: Path, **how: Any) -> EvaluationRun:
    """A run directory ready for Publish."""
    from finetune_trainer.evaluate import stage

    run = evaluation_run(root, **how)
    stage.run(run.context())
    return run


# -- rows -------------------------------------------------------------------------------------------------------


def _write_rows(path: Path, rows: Sequence[EvaluationRow | BaselineRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(json_line, rows)), encoding="utf-8")


def _example(task: Task, source: random.Random) -> tuple[str, list[str], str]:
    """(text, candidates or references, answer); the answer follows from the first word."""
    label = source.choice(LABELS)
    text = f"{source.choice(WORDS[label])} {source.choice(['day', 'bus', 'tea', 'walk'])} {source.randrange(100)}"
    if task is Task.MULTIPLE_CHOICE:
        return text, source.sample(LABELS, 3), label
    return text, LABELS if task is Task.CLASSIFICATION else [label], label


def _turns(text: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"How is: {text}?"}, {"role": "assistant", "content": answer}]


def _row(task: Task, name: str, number: int, example: tuple[str, list[str], str], chat: ChatFormat) -> EvaluationRow:
    text, candidates, answer = example
    key = {"id": f"{name}/{number}", "dataset": name, "task": task.value}
    if task in (Task.INSTRUCTION, Task.CHAT, Task.TEXT):
        ids = _training_ids(task, example, chat)
        start = ids["start"]
        positions = list(range(start - 1, len(ids["ids"]) - 1))
        targets = [ids["ids"][p + 1] for p in positions]
        return EvaluationRow(**key, ids=ids["ids"], target_position=positions, target_id=targets)
    prompt, prompt_ids = chat.prompt(_turns(text, answer)[:1])
    shared = {"prompt": prompt, "prompt_ids": prompt_ids, "text": text, "answers": [answer]}
    if task in (Task.QUESTION_ANSWERING, Task.SUMMARIZATION):
        return EvaluationRow(**key, **shared)
    closed = [chat.answer_ids(candidate) for candidate in candidates]
    gold = candidates.index(answer)
    return EvaluationRow(**key, **shared, candidates=list(candidates), candidate_ids=closed, gold=gold)


def _with_examples(row: EvaluationRow, shown: list[dict[str, str]], chat: ChatFormat) -> EvaluationRow:
    from dataclasses import replace

    question = [{"role": "user", "content": f"How is: {row.text}?"}]
    return replace(row, few_shot_prompt_ids=chat.prompt([*shown, *question])[1])


def _training_ids(task: Task, example: tuple[str, list[str], str], chat: ChatFormat) -> dict[str, Any]:
    text, _, answer = example
    prompt = chat.prompt(_turns(text, answer)[:1])[1]
    return {"ids": [*prompt, *chat.answer_ids(answer)], "start": len(prompt)}


def _able_to_be_sure(base: Path) -> Path:
    """A random model's logits are all near 0, and what is frozen keeps them there: its last norm is scaled up."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 15
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


# -- what earlier stages leave ----------------------------------------------------------------------------------


def _manifest(prepared: Path, base: Path, datasets: list[PreparedDataset], chat: ChatFormat) -> PreparedManifest:
    chat.tokenizer.save_pretrained(prepared / "tokenizer")
    span = Span(documents=96, tokens=96 * 40, labelled=96 * 5, longest=60)
    manifest = PreparedManifest(
        config_digest="c" * 64,
        model=PreparedModel(directory=str(base), source="acme/tiny-base", commit="b" * 40, digest="d" * 64),
        pad_token_id=chat.tokenizer.pad_token_id,
        end_token_ids=chat.end_token_ids,
        datasets=datasets,
        train=span,
        validation=span,
        evaluation_split="test",
        digest="e" * 64,
    )
    manifest.write(prepared)
    return manifest


def _config(root: Path, tasks: Sequence[Task], changes: Mapping[str, Any] | None) -> RunConfig:
    datasets = [{"name": task.value, "path": f"{task.value}.csv", "task": task.value} for task in tasks]
    given = {"spec.datasets": datasets, "spec.training.precision": "fp32", **(changes or {})}
    config = RunConfig(
        job=JobRef(namespace="default", name="weather", uid="3f0c"),
        spec=resolve(job(given, "weather").spec),
        paths=Paths(run=str(root / "run"), cache=str(root / "cache"), source=str(root)),
    )
    write_json(root / "run/run-config.json", config.to_wire())
    return config


def _export(directory: Path, base: Path, training: list[dict[str, Any]], steps: int) -> None:
    """An adapter in the form of the Train stage, from a loop of ten lines that shares nothing with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned: Any = get_peft_model(model, lora)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-3)
        source = random.Random(2)
        for _ in range(steps):
            batch = source.sample(training, 24)
            width = max(len(row["ids"]) for row in batch)
            ids = torch.tensor([row["ids"] + [0] * (width - len(row["ids"])) for row in batch])
            labels = ids.clone()
            for index, row in enumerate(batch):
                labels[index, : row["start"]] = labels[index, len(row["ids"]) :] = -100
            tuned(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    tuned.peft_config["default"].base_model_name_or_path = "acme/tiny-base"
    tuned.save_pretrained(directory, save_embedding_layers=False)  # else the Hub is asked for the base's config
    (directory / "README.md").unlink(missing_ok=True)
    _tokenizer(base).save_pretrained(directory)
    exporting._seal(directory)


def _history(run: EvaluationRun) -> None:
    """Reports and curves as Prepare and Train would have left them."""
    reports = run.path / "reports"
    for stage in (Stage.PREPARE, Stage.TRAIN):
        context = run.context(stage)
        context.reporter.update(warnings=["12 steps in all: the model will hardly change."] * (stage is Stage.PREPARE))
        fields: dict[str, Any] = {}
        if stage is Stage.PREPARE:
            notes = ["2 near-duplicates were kept on one side."]
            facts = {"rows": 156, "bad_rows": 1, "train": 96, "test": 60, "notes": notes}
            fields["datasets"] = [DatasetFacts(name=d.name, source=d.source, **facts) for d in run.manifest.datasets]
            fields["plan"] = Plan(
                world_size=1,
                steps=40,
                examples=96,
                tokens=9600,
                tokens_per_rank_step=960,
                trainable_parameters=20_000,
                parameters=100_000,
                micro_batch_tokens=1024,
                memory=[MemoryComponent(name="weights", bytes=400_000)],
                memory_bytes=400_000,
            )
        else:
            digest = export_digest(run.path / "export")
            fields["export"] = ExportRef(digest=digest, format="adapter", size_bytes=1, step=40)
            fields["choices"] = {"attention": Choice(value="sdpa", why="no GPU")}
            fields["origin"] = {"seed": 42}
        context.reporter.done(**fields)
    assert sorted(path.name for path in reports.iterdir()) == ["prepare-1.json", "train-1.json"]
    source = random.Random(3)
    metrics = run.path / "metrics" / "train.jsonl"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with metrics.open("w") as file:
        for step in range(1, 41):
            loss = 1.2 * 0.93**step + 0.2 + source.gauss(0, 0.05)
            rate = 2e-4 * min(step / 4, (40 - step) / 36)
            row = {"step": step, "loss": loss, "learningRate": rate, "gradNorm": 1 + loss, "tokens": 240}
            file.write(json.dumps(row | {"tokensPerSecond": 90 + source.gauss(0, 4)}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "validation": {"loss": loss + 0.05, "accuracy": 0.5}}) + "\n")
