"""The stage Prepare: everything that can be done and can go wrong without a GPU.

It reads what `fetch` brought here and the paths that the spec names, without a token and without the Hub, and writes
`prepared/`, which appears whole by a rename or not at all. Run again with the same config it only says again what it
found.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from finetune_api.holdout import selects_checkpoint
from finetune_api.report import Digests, Progress, Report
from finetune_api.runconfig import resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import RunContext
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.documents import DocumentStore, DocumentWriter
from finetune_trainer.data.manifest import MANIFEST_FILE, PreparedManifest, PreparedModel
from finetune_trainer.files import sha256_of
from finetune_trainer.prepare.compatibility import refuse_combinations, refuse_ids_beyond_embeddings
from finetune_trainer.prepare.facts import (
    FACTS,
    FACTS_FILE,
    dataset_facts,
    evaluation_split,
    length_facts,
    origin_of,
    prepared_dataset,
    report_split,
    span,
)
from finetune_trainer.prepare.fetched import Fetched, read_fetched
from finetune_trainer.prepare.gate_check import check_gate
from finetune_trainer.prepare.inputs import open_datasets
from finetune_trainer.prepare.mixture import SplitAssignment, assign_splits
from finetune_trainer.prepare.models import (
    LocalModel,
    describe,
    load_config,
    locate_adapter,
    locate_model,
    model_digest,
    nf4_copy,
    quantised_share,
)
from finetune_trainer.prepare.rendering import RowCounts
from finetune_trainer.prepare.reuse import config_digest, is_prepared
from finetune_trainer.prepare.scan import scan_all
from finetune_trainer.prepare.tokenizer import document_limit, open_chat
from finetune_trainer.prepare.workers import Workers
from finetune_trainer.prepare.write import DatasetWriter, rendering_of
from finetune_trainer.starting_adapter import refuse_other_base_weights


def run(context: RunContext) -> None:
    """Prepare model and data for the job. Raises TrainerError with what is wrong and what to do."""
    digest = config_digest(context.config)
    if not is_prepared(context, digest):
        if context.config.spec.reads_hub:
            context.check_fence()  # `fetch` has taken it for this attempt
        else:
            context.take_fence()
        fetched = read_fetched(context, digest)
        for left_over in context.run.glob(".prepared-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        aside = context.run / f".prepared-{context.attempt.number}"
        try:
            _prepare(context, digest, fetched, aside)
            context.check_fence()
            _publish(aside, context.prepared)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    found = json.loads((context.prepared / FACTS_FILE).read_text())
    told = Report.model_validate(context.reporter.report.to_wire() | found)
    digests = Digests(prepared=sha256_of(context.prepared / MANIFEST_FILE))
    context.reporter.done(**{name: getattr(told, name) for name in FACTS}, digests=digests)


def _publish(aside: Path, prepared: Path) -> None:
    """Put the finished directory in place; another one that is there gives way."""
    if prepared.exists():
        old = prepared.with_name(f".prepared-old-{os.getpid()}")
        prepared.rename(old)
        aside.rename(prepared)
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(prepared)


def _prepare(context: RunContext, digest: str, fetched: Fetched, aside: Path) -> None:
    """Cheap checks first: a misspelt column is told before millions of rows are read."""
    aside.mkdir(parents=True)
    spec = resolve(context.config.spec)
    context.reporter.activity("checking model and datasets")
    dataset_readers = open_datasets(context, spec, fetched)
    local = locate_model(spec.model, fetched, context.resolve_source, context.cache)
    adapter = locate_adapter(spec.model, fetched, context.resolve_source, context.cache)
    tokenizer, chat = open_chat(context, spec, local)
    tokenizer.save_pretrained(aside / "tokenizer")
    config = load_config(local.directory, trust_remote_code=spec.model.trust_remote_code)
    most = document_limit(context, spec, config)
    tasks = [reader.task for reader in dataset_readers]
    refuse_combinations(spec, config, tokenizer, tasks, adapter[0] if adapter else None)
    if adapter:
        refuse_other_base_weights(adapter[0], local.directory)

    with Workers() as workers:
        context.reporter.activity("splitting the rows")
        scans = scan_all(dataset_readers, spec.split.seed, workers, _ticker(context, 0), aside)
        assignments = assign_splits(scans, spec)
        context.reporter.activity("rendering and tokenising")
        written = _write_all(context, spec, assignments, chat, most, aside, workers)
    scored = {d.reader.name: w.scored for d, w in zip(assignments, written, strict=True)}
    check_gate(spec, scans, assignments, scored)

    refuse_ids_beyond_embeddings(config, tokenizer, chat.end_token_ids, aside)
    train, validation = DocumentStore(aside / "train"), DocumentStore(aside / "validation")
    manifest = PreparedManifest(
        config_digest=digest,
        model=_prepared_model(context, spec, local, adapter),
        pad_token_id=int(tokenizer.pad_token_id),
        end_token_ids=chat.end_token_ids,
        datasets=[prepared_dataset(d, w) for d, w in zip(assignments, written, strict=True)],
        train=span(train),
        validation=span(validation),
        evaluation_split=evaluation_split(assignments),
        digest=directory_digest(aside),
    )
    report_split(context.reporter, assignments, manifest, selects_checkpoint=selects_checkpoint(spec))
    told = context.reporter.report.model_copy(
        update={
            "model": describe(config, local.directory),
            "lengths": length_facts(train, manifest.datasets),
            "datasets": [dataset_facts(d, w, most) for d, w in zip(assignments, written, strict=True)],
            "origin": origin_of(manifest, spec.training.seed),
        }
    ).to_wire()
    # A second run says the same again without doing the work.
    (aside / FACTS_FILE).write_text(json.dumps({name: told[name] for name in FACTS if name in told}, indent=1))
    manifest.write(aside)


def _ticker(context: RunContext, total: int, unit: str = "rows") -> Callable[[int], None]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        context.reporter.progress(Progress(step=done, total=total, unit=unit))

    return tick


def _write_all(
    context: RunContext,
    spec: FineTuneJobSpec,
    assignments: list[SplitAssignment],
    chat: ChatFormat,
    most: int,
    aside: Path,
    workers: Workers,
) -> list[RowCounts]:
    total = sum(len(sides) for assignment in assignments for sides in assignment.sides.values())
    tick = _ticker(context, total)
    with DocumentWriter(aside / "train") as train, DocumentWriter(aside / "validation") as validation:
        return [
            DatasetWriter(
                assignment,
                rendering_of(assignment, chat, most),
                train,
                validation,
                aside,
                answer_tokens=spec.evaluation.max_new_tokens,
                few_shot=spec.evaluation.few_shot,
                workers=workers,
                tick=tick,
            ).write()
            for assignment in assignments
        ]


def _prepared_model(
    context: RunContext, spec: FineTuneJobSpec, local: LocalModel, adapter: tuple[Path, str] | None
) -> PreparedModel:
    context.reporter.activity("hashing the model")
    model = PreparedModel(
        directory=str(local.directory),
        source=local.source,
        commit=local.commit,
        digest=model_digest(local.directory, context.cache, _ticker(context, 0, "files")),
        adapter_directory=str(adapter[0]) if adapter else None,
        adapter_source=adapter[1] if adapter else "",
    )
    if not spec.tuning.method.traits.four_bit:
        return model
    context.reporter.activity("writing the 4-bit copy")
    copy = nf4_copy(model, spec.tuning.quantization, context.cache, _ticker(context, 0, "tensors"))
    why = "linear layers but the head; embeddings, norms and stacked experts stay in 16 bits"
    context.reporter.choose("quantized", f"{quantised_share(copy):.0%} of the parameters", why)
    return model.model_copy(update={"nf4_directory": str(copy)})


def directory_digest(directory: Path) -> str:
    """sha256 over the names and contents of all files but the manifest and the facts."""
    total = sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST_FILE, FACTS_FILE):
            total.update(f"{path.relative_to(directory)}\0{sha256_of(path)}\n".encode())
    return total.hexdigest()
