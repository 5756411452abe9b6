"""Evaluate: 77 labels by likelihood against one forward pass per label, and batched generation against one by one."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks import jobs
from benchmarks.harness import Figures, Result, Size, Table, in_turn, ratios, spread

from finetune_api.traits import Method
from finetune_trainer.data.evaluation_rows import read_evaluation
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.evaluate.final_answer import AnswerReader
from finetune_trainer.evaluate.generation import greedy_answers
from finetune_trainer.evaluate.likelihood import (
    ClosedQuestion,
    as_sequences,
    plain_scores,
    sequence_scores,
    tree_scores,
)
from finetune_trainer.evaluate.models import model_pair, opened
from finetune_trainer.model.device import choose_precision

AIM = 10
NEW_TOKENS = 16
DOCUMENTS_PER_LABEL = 2
"""Documents on which every label has a forward pass of its own: it takes long."""


@contextmanager
def loaded(job: jobs.PreparedJob) -> Iterator[tuple[Any, Any]]:
    """The base model and its tokenizer, as Evaluate holds them."""
    from transformers import AutoTokenizer

    manifest, device = PreparedManifest.read(job.prepared), torch.device("cpu")
    precision, _ = choose_precision("auto", device)
    source = model_pair(manifest, job.run / "export", Method.LORA, precision, device, compute_dtype=precision)
    with opened(source, "base") as model:
        yield model, AutoTokenizer.from_pretrained(job.prepared / "tokenizer")


def closed_rows(job: jobs.PreparedJob, name: str) -> list[ClosedQuestion]:
    """The held-out rows of a closed task."""
    rows = list(read_evaluation(job.prepared / "evaluation" / f"{name}.jsonl"))
    return [ClosedQuestion(tuple(r.prompt_ids), tuple(tuple(ids) for ids in r.candidate_ids or ())) for r in rows]


def label_by_label(model: Any, rows: Sequence[ClosedQuestion]) -> list[list[float]]:
    """One forward pass for each label of each row."""
    return [[sequence_scores(model, [one])[0].sum for one in as_sequences(row)] for row in rows]


def score_labels(model: Any, rows: Sequence[ClosedQuestion], rounds: int) -> Figures:
    """Seconds per document for each way, measured alternately, and the largest difference of their scores."""
    few = rows[:DOCUMENTS_PER_LABEL]
    scores: dict[str, list[list[float]]] = {}

    def way(name: str, score: Callable[..., list[list[float]]], on: Sequence[ClosedQuestion]) -> Callable[[], float]:
        def run() -> float:
            begun = time.perf_counter()
            scores[name] = score(model, on)
            return (time.perf_counter() - begun) / len(on)

        return run

    for score in (tree_scores, plain_scores, label_by_label):  # warms up
        score(model, [ClosedQuestion(few[0].prompt, few[0].candidates[:2])])
    ways = {
        "shared prefix and label tree": way("tree", tree_scores, rows),
        "labels in padded batches": way("plain", plain_scores, few),
        "one forward a label": way("single", label_by_label, few),
    }
    samples = in_turn(ways, rounds)
    pairs = zip(scores["tree"], scores["single"], strict=False)
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    return {"secondsADocument": samples, "documents": len(rows), "labels": len(rows[0].candidates), "apart": apart}


def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], rounds: int, new_tokens: int) -> Figures:
    """Seconds for all prompts of each way, in turn."""
    reader = AnswerReader(tokenizer)

    def answers(groups: Sequence[Sequence[Sequence[int]]]) -> Callable[[], float]:
        def run() -> float:
            begun = time.perf_counter()
            for group in groups:
                greedy_answers(model, reader, group, max_new_tokens=new_tokens, tokens_per_batch=8192)
            return time.perf_counter() - begun

        return run

    size = 8
    in_order = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    ways = {
        "batched, sorted by length": answers([prompts]),
        f"batches of {size} in the order of the rows": answers(in_order),
        "one by one": answers([[prompt] for prompt in prompts]),
    }
    answers([prompts[:size]])()  # warms up
    return {"seconds": in_turn(ways, rounds), "prompts": len(prompts), "newTokens": new_tokens}


def table_of(samples: dict[str, list[float]], title: str, unit: str) -> Table:
    """One row a way; the ratio is to the first in the same round."""
    table = Table(title, ("", f"{unit}: median (least to most)", "speed-up of the first"))
    first = next(iter(samples.values()))
    for name, values in samples.items():
        table.rows.append([name, spread(values, 3), f"{statistics.median(ratios(values, first)):.1f}"])
    return table


def run(size: Size) -> Result:
    """Both on the model that the other benchmarks train."""
    model_file, rounds = jobs.smollm2(), size.pick(1, 1, 5)
    labels = jobs.INTENTS[: size.pick(5, 77)]
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        workload = jobs.intents(4 * len(labels), labels=labels)
        held_out = {"validation": 0, "test": 0.25}
        job = jobs.prepare(Path(folder) / "intents", model_file, workload, split=held_out)
        tweets = jobs.prepare(Path(folder) / "tweets", model_file, jobs.tweets(200), split=held_out)
        rows = closed_rows(job, "intents")[: size.pick(4, 24, 77)]
        prompts = [row.prompt for row in closed_rows(tweets, "tweets")[: size.pick(4, 40)]]
        with loaded(job) as (model, tokenizer):
            scored = score_labels(model, rows, rounds)
            generated = generate(model, tokenizer, prompts, size.pick(1, 5), NEW_TOKENS)
            precision = str(model.dtype).removeprefix("torch.")
    samples = scored["secondsADocument"]
    medians = {name: statistics.median(values) for name, values in samples.items()}
    factor = medians["one forward a label"] / medians["shared prefix and label tree"]
    slow = f"the slow ways: {DOCUMENTS_PER_LABEL}"
    title = f"{scored['labels']} labels by likelihood, {scored['documents']} documents ({slow})"
    second = f"{generated['prompts']} answers of at most {NEW_TOKENS} tokens"
    tables = [table_of(samples, title, "seconds per document"), table_of(generated["seconds"], second, "seconds")]
    notes = [
        f"{factor:.0f} times one forward a label (aim {AIM}); scores differ by at most {scored['apart']:.3f} nats "
        f"({precision})."
    ]
    return Result("evaluate", {"labels": scored, "factor": factor, "generation": generated}, tables, notes)
