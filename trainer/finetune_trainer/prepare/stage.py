"""The stage Prepare: everything that can be done and can go wrong without a GPU.

It reads the Hub and the files that the spec names, and writes `prepared/`, which appears whole by a rename or not
at all. Run again with the same config it only says again what it found.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.report import DatasetFacts, FailureClass, LengthFacts, ModelFacts, Progress
from finetune_api.runconfig import RunConfig, resolve
from finetune_api.spec import FineTuneJobSpec, Method
from finetune_trainer.context import RunContext
from finetune_trainer.data.chat import ChatFormat, ChatTemplateError, choose_pad, with_plain_template
from finetune_trainer.data.documents import DocumentStore, DocumentWriter
from finetune_trainer.data.manifest import PreparedDataset, PreparedManifest, PreparedModel, Span
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import gguf
from finetune_trainer.prepare.hub import Hub
from finetune_trainer.prepare.mixture import UNSEEN_HALF, Division, divide
from finetune_trainer.prepare.models import (
    LocalModel,
    describe,
    fetch_adapter,
    fetch_model,
    load_config,
    model_digest,
    nf4_copy,
)
from finetune_trainer.prepare.scan import Reading, Scan, open_reading, scan
from finetune_trainer.prepare.sources import DatasetSource, Head, choose_files, file_digest, open_path, open_source
from finetune_trainer.prepare.write import DatasetWriter, Written, rendering_of

log = logging.getLogger(__name__)

FACTS_FILE = "facts.json"
CONVERTED_REVISION = "refs/convert/parquet"
"""Where the Hub keeps Parquet files of datasets that only a script can load."""
PACKAGES = ("finetune-operator", "torch", "transformers", "tokenizers", "huggingface-hub", "pyarrow", "numpy")


def run(context: RunContext) -> None:
    """Prepare model and data for the job. Raises TrainerError with what is wrong and what to do."""
    digest = config_digest(context.config)
    if not _is_prepared(context, digest):
        context.take_fence()
        for left_over in context.run.glob(".prepared-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        aside = context.run / f".prepared-{context.attempt.number}"
        try:
            _prepare(context, digest, aside)
            context.check_fence()
            _publish(aside, context.prepared)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    facts = json.loads((context.prepared / FACTS_FILE).read_text())
    report = type(context.reporter.report)
    told = report.model_validate(context.reporter.report.to_wire() | facts)
    context.reporter.done(**{name: getattr(told, name) for name in FACTS})


FACTS = ("model", "lengths", "datasets", "origin", "choices", "warnings")
"""Fields of the report that Prepare fills."""


def config_digest(config: RunConfig) -> str:
    """sha256 of everything in the run config that decides what `prepared/` holds."""
    spec = config.spec
    training, evaluation = spec.training, spec.evaluation
    parts = {
        "model": spec.model.to_wire(),
        "datasets": [dataset.to_wire() for dataset in spec.datasets],
        "split": spec.split.to_wire(),
        "tuning": [spec.tuning.method, spec.tuning.quantization.to_wire(), _virtual_tokens(spec)],
        "training": [training.max_sequence_length, _selects(spec)],
        "evaluation": [evaluation.few_shot, evaluation.max_rows, evaluation.max_new_tokens],
        "paths": [config.paths.source, config.paths.cache],
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _is_prepared(context: RunContext, digest: str) -> bool:
    try:
        manifest = PreparedManifest.read(context.prepared)
    except (OSError, ValueError):
        return False
    places = (manifest.model.directory, manifest.model.nf4_directory, manifest.model.adapter_directory)
    return manifest.config_digest == digest and all(Path(place).is_dir() for place in places if place)


def _publish(aside: Path, prepared: Path) -> None:
    """Put the finished directory in place; another one that is there gives way."""
    if prepared.exists():
        old = prepared.with_name(f".prepared-old-{os.getpid()}")
        prepared.rename(old)
        aside.rename(prepared)
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(prepared)


def _prepare(context: RunContext, digest: str, aside: Path) -> None:
    aside.mkdir(parents=True)
    hub = hub_of(context)
    spec = resolve(context.config.spec)
    # Datasets are opened before the model is downloaded: a misspelt column is told in seconds, not after 16 GB.
    context.reporter.activity("checking the datasets")
    readings = open_datasets(context, spec, hub)
    context.reporter.activity("fetching the model")
    local = fetch_model(spec.model, hub, context.resolve_source, context.cache)
    config = load_config(local.directory, trust_remote_code=spec.model.trust_remote_code)
    adapter = fetch_adapter(spec.model, hub, context.resolve_source)
    tokenizer, chat = open_chat(context, spec, local)
    tokenizer.save_pretrained(aside / "tokenizer")
    facts = describe(config, local.directory)
    most = document_limit(context, spec, facts)

    context.reporter.activity("dividing the rows")
    divisions = divide(
        scan_all(context, spec, readings), spec.split, selects=_selects(spec), max_rows=spec.evaluation.max_rows
    )
    context.reporter.activity("rendering and tokenising")
    written = _write_all(context, spec, divisions, chat, most, aside)
    model = _prepared_model(context, spec, local, adapter)
    stores = DocumentStore(aside / "train"), DocumentStore(aside / "validation")
    manifest = PreparedManifest(
        config_digest=digest,
        model=model,
        pad_token_id=int(tokenizer.pad_token_id),
        end_token_ids=chat.end_token_ids,
        datasets=[_prepared_dataset(d, w) for d, w in zip(divisions, written, strict=True)],
        train=_span(stores[0]),
        validation=_span(stores[1]),
        evaluation_split=_evaluation_split(divisions),
        digest="",
    )
    _say(context, spec, divisions, manifest)
    _write_facts(context, aside, facts, manifest, divisions, written, stores[0], most)
    manifest = manifest.model_copy(update={"digest": directory_digest(aside)})
    manifest.write(aside)


# --- sources ---


def hub_of(context: RunContext) -> Hub:
    """The Hub with this stage's token, telling its bytes to the report."""

    def progress(done: int, total: int) -> None:
        context.reporter.progress(Progress(step=done, total=total, unit="bytes"))

    return Hub(context.token("hub"), context.cache / "hub", progress)


def open_datasets(context: RunContext, spec: FineTuneJobSpec, hub: Hub) -> list[Reading]:
    """Every dataset on this machine, its columns found. Raises TrainerError as the parts do."""
    readings = []
    for index, dataset in enumerate(spec.datasets):
        field = f"datasets[{index}]"
        if dataset.path is not None:
            path = context.resolve_source(dataset.path)
            source = open_path(path, dataset.path, dataset.config, field)
        else:
            source = _open_repo(hub, str(dataset.repo), dataset.revision, dataset.config, field)
        readings.append(open_reading(dataset, index, source))
    return readings


def _open_repo(hub: Hub, repo: str, revision: str, config: str | None, field: str) -> DatasetSource:
    resolved = hub.resolve(repo, revision, "dataset", field)
    names = [file.name for file in resolved.files]
    notes: tuple[str, ...] = ()
    script = f"{repo.rpartition('/')[2]}.py"
    if script in names and revision == "main":
        # The rows are where the script would fetch them; the Hub's own conversion holds them as files.
        resolved = hub.resolve(repo, CONVERTED_REVISION, "dataset", field)
        names = [file.name for file in resolved.files]
        notes = (f"read from {CONVERTED_REVISION}, for the repository itself has a loading script",)
    head = Head()
    if "README.md" in names:
        readme = hub.download(resolved, ["README.md"], field) / "README.md"
        head = Head.parse(readme.read_text(encoding="utf-8", errors="replace"))
    files, chosen = choose_files(names, head, config, field)
    root = hub.download(resolved, [name for members in files.values() for name in members], field)
    return open_source(root, files, head.class_names(chosen), f"{repo}@{resolved.commit}", notes)


def open_chat(context: RunContext, spec: FineTuneJobSpec, local: LocalModel) -> tuple[Any, ChatFormat]:
    """The tokenizer with the template and pad token that this job uses, everywhere and in the export.

    Raises TrainerError (bad-spec) where the template cannot be used or nothing can pad.
    """
    tokenizer = load_tokenizer(local.directory, trust_remote_code=spec.model.trust_remote_code)
    if spec.model.chat_template is not None:
        tokenizer.chat_template = spec.model.chat_template
        context.reporter.choose("chatTemplate", "model.chatTemplate", "given in the spec")
    elif with_plain_template(tokenizer):
        context.reporter.choose("chatTemplate", "plain", "the tokenizer has none")
        context.reporter.warn(
            "The tokenizer has no chat template: a plain one is used (`User:`, `Assistant:`) and exported with the "
            "model. Give model.chatTemplate to use another."
        )
    try:
        chat = ChatFormat(tokenizer)
    except ChatTemplateError as error:
        raise TrainerError(FailureClass.BAD_SPEC, f"{str(error).capitalize()}.", "model.chatTemplate") from error
    pad = choose_pad(tokenizer, chat.end_token_ids)
    if pad is None:
        raise TrainerError(
            FailureClass.BAD_SPEC,
            "The tokenizer has no token that could pad: all it has end answers. Set pad_token in its "
            "tokenizer_config.json to a token that no text uses.",
            "model",
        )
    tokenizer.pad_token = pad.token
    context.reporter.choose("padToken", pad.token, pad.why)
    if chat.implicit_system:
        context.reporter.choose("systemPrompt", chat.implicit_system, "added by the chat template where a row has none")
    if not chat.keeps_history:
        context.reporter.choose(
            "chatDocuments",
            "one a turn",
            "the chat template renders earlier turns otherwise in longer chats, so each answer is learnt on its own",
        )
    if not chat.end_text:
        context.reporter.warn(
            "The chat template writes no token after an answer: the tokenizer's end token is put there, "
            "so that the model learns to stop."
        )
    if local.converted:
        context.reporter.choose("conversion", gguf.DTYPE, gguf.WHY_BFLOAT16)
    return tokenizer, chat


def load_tokenizer(place: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or a GGUF file. Raises TrainerError (bad-spec) where there is none."""
    from transformers import AutoTokenizer

    if place.is_file():
        return gguf.load_tokenizer(place)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sentence = f"The model's tokenizer cannot be read: {reason[:400]}"
        raise TrainerError(FailureClass.BAD_SPEC, sentence, "model") from error


def document_limit(context: RunContext, spec: FineTuneJobSpec, facts: ModelFacts) -> int:
    """Tokens of a document at most: `maxSequenceLength`, within the model's context less the virtual tokens."""
    asked, longest = spec.training.max_sequence_length, facts.max_position_embeddings
    room = (longest or asked) - _virtual_tokens(spec)
    if asked > room:
        context.reporter.warn(
            f"training.maxSequenceLength {asked} is more than the model's context has room for: {room} is used."
        )
    return min(asked, room)


def _virtual_tokens(spec: FineTuneJobSpec) -> int:
    tuning = spec.tuning
    if tuning.method is Method.PROMPT:
        return tuning.prompt.virtual_tokens
    return tuning.prefix.virtual_tokens if tuning.method is Method.PREFIX else 0


def _selects(spec: FineTuneJobSpec) -> bool:
    """Whether training chooses by validation, so that those rows can no longer measure."""
    return spec.training.keep_best or spec.training.early_stopping is not None


# --- rows ---


def scan_all(
    context: RunContext, spec: FineTuneJobSpec, readings: list[Reading]
) -> list[tuple[Reading, dict[str, Scan]]]:
    """The first look at every split that is used."""
    tick = _ticker(context, 0)
    return [
        (reading, {split: scan(reading, split, spec.split.seed, tick) for split in used_splits(reading)})
        for reading in readings
    ]


def used_splits(reading: Reading) -> list[str]:
    """Names of the dataset's own splits that the job uses, train first."""
    own = reading.spec.splits
    return list(dict.fromkeys(filter(None, (own.train, own.validation, own.test))))


def _ticker(context: RunContext, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % 256 == 0:
            context.reporter.progress(Progress(step=done, total=total, unit="rows"))

    return tick


def _write_all(
    context: RunContext, spec: FineTuneJobSpec, divisions: list[Division], chat: ChatFormat, most: int, aside: Path
) -> list[Written]:
    total = sum(len(sides) for division in divisions for sides in division.sides.values())
    tick = _ticker(context, total)
    with DocumentWriter(aside / "train") as train, DocumentWriter(aside / "validation") as validation:
        return [
            DatasetWriter(
                division,
                rendering_of(division, chat, most),
                train,
                validation,
                aside,
                answer_tokens=spec.evaluation.max_new_tokens,
                few_shot=spec.evaluation.few_shot,
                tick=tick,
            ).write()
            for division in divisions
        ]


# --- what was found ---


def _prepared_model(
    context: RunContext, spec: FineTuneJobSpec, local: LocalModel, adapter: tuple[Path, str] | None
) -> PreparedModel:
    context.reporter.activity("hashing the model")
    model = PreparedModel(
        directory=str(local.directory),
        source=local.source,
        commit=local.commit,
        digest=model_digest(local.directory, context.cache),
        adapter_directory=str(adapter[0]) if adapter else None,
        adapter_source=adapter[1] if adapter else "",
    )
    if spec.tuning.method is not Method.QLORA:
        return model
    context.reporter.activity("writing the 4-bit copy")
    copy = nf4_copy(model, spec.tuning.quantization, context.cache)
    return model.model_copy(update={"nf4_directory": str(copy)})


def _prepared_dataset(division: Division, written: Written) -> PreparedDataset:
    spec = division.reading.spec
    return PreparedDataset(
        index=division.reading.index,
        name=spec.name,
        task=division.reading.task,
        labels=list(division.labels),
        source=division.reading.source.origin,
        train=written.train,
        validation=written.validation,
        test=written.scored,
        evaluation_split=division.evaluation,
        weight=spec.weight,
        loss_weight=spec.loss_weight,
    )


def _evaluation_split(divisions: list[Division]) -> str:
    kinds = {division.evaluation for division in divisions}
    if len(kinds) == 1:
        return kinds.pop()
    return ", ".join(f"{division.evaluation} ({division.reading.name})" for division in divisions)


def _span(store: DocumentStore) -> Span:
    longest = int(store.lengths.max()) if len(store) else 0
    return Span(documents=len(store), tokens=len(store.ids), labelled=len(store.target_id), longest=longest)


def _say(context: RunContext, spec: FineTuneJobSpec, divisions: list[Division], manifest: PreparedManifest) -> None:
    for division in divisions:
        for sentence in division.warnings:
            context.reporter.warn(f"{sentence}.")
        foreign = sum(scan.counts.foreign for scan in division.scans.values())
        if foreign:
            context.reporter.warn(
                f"{foreign} rows of {division.reading.name} are not UTF-8: their odd bytes were read as Windows-1252."
            )
        if division.evaluation == "none":
            context.reporter.warn(
                f"Nothing of {division.reading.name} is held out, so nothing can be measured on it: "
                "set split.validation, split.test or datasets[].splits."
            )
    if UNSEEN_HALF in {division.evaluation for division in divisions}:
        context.reporter.choose(
            "evaluationSplit",
            manifest.evaluation_split,
            "a checkpoint is chosen on the validation rows (keepBest or earlyStopping), so half of them is kept unseen",
        )
    if not manifest.validation.documents and _selects(spec):
        context.reporter.warn("There are no validation rows: the last checkpoint is exported, not the best one.")


def _dataset_facts(division: Division, written: Written, most: int) -> DatasetFacts:
    scans = division.scans.values()
    bad = sum(scan.bad.count for scan in scans) + written.bad.count
    first = [line for scan in scans for line in scan.bad.first] + written.bad.first
    left_out = division.count("left out") + division.count("excluded")
    filtered = sum(scan.counts.filtered for scan in scans)
    notes = [
        *division.reading.source.notes,
        *([f"the filter left out {filtered} rows"] if filtered else []),
        *([f"maxRows left out {left_out} rows"] if left_out else []),
        *([f"{bad} rows cannot be used: {'; '.join(first[:3])}{'; …' if bad > 3 else ''}"] if bad else []),
        *([f"evaluation.maxRows draws {written.scored} rows"] if division.scored is not None else []),
        *([f"measured on the {division.evaluation}"] if division.evaluation != "none" else []),
        *division.notes,
        *written.notes(most),
    ]
    return DatasetFacts(
        name=division.reading.name,
        source=division.reading.source.origin,
        rows=sum(len(scan) for scan in scans) - written.bad.count,
        bad_rows=bad,
        train=written.train,
        validation=written.validation,
        test=written.scored,
        labels=len(division.labels) or None,
        notes=notes,
    )


def length_facts(store: DocumentStore, datasets: list[PreparedDataset]) -> LengthFacts:
    """Documents and tokens of one epoch of the mixture: round(weight × documents) of each dataset."""
    documents, tokens, labelled = 0, 0.0, 0.0
    lengths, targets = store.lengths, store.target_counts
    for dataset in datasets:
        mine = np.asarray(store.dataset) == dataset.index
        count = int(mine.sum())
        drawn = round(dataset.weight * count)
        documents += drawn
        tokens += float(lengths[mine].sum()) * drawn / max(count, 1)
        labelled += float(targets[mine].sum()) * drawn / max(count, 1)
    return LengthFacts(
        documents=documents, tokens=round(tokens), longest=int(lengths.max(initial=0)), labelled=round(labelled)
    )


def _write_facts(
    context: RunContext,
    aside: Path,
    facts: ModelFacts,
    manifest: PreparedManifest,
    divisions: list[Division],
    written: list[Written],
    store: DocumentStore,
    most: int,
) -> None:
    """Leave the report's fields beside the data: a second run says them again without doing the work."""
    model = manifest.model
    origin = {
        "model": f"{model.source}@{model.commit}" if model.commit else f"{model.source} sha256:{model.digest}",
        "datasets": {dataset.name: dataset.source for dataset in manifest.datasets},
        "configDigest": manifest.config_digest,
        "versions": {name: version(name) for name in PACKAGES},
        "seed": context.config.spec.training.seed,
    }
    if model.adapter_source:
        origin["adapter"] = model.adapter_source
    told = context.reporter.report.model_copy(
        update={
            "model": facts,
            "lengths": length_facts(store, manifest.datasets),
            "datasets": [_dataset_facts(d, w, most) for d, w in zip(divisions, written, strict=True)],
            "origin": origin,
        }
    ).to_wire()
    (aside / FACTS_FILE).write_text(json.dumps({name: told[name] for name in FACTS if name in told}, indent=1))


def directory_digest(directory: Path) -> str:
    """sha256 over the names and contents of all files but the manifest."""
    total = sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", FACTS_FILE):
            total.update(f"{path.relative_to(directory)}\0{file_digest(path)}\n".encode())
    return total.hexdigest()
