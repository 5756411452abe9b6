"""`finetune preview`: three examples of each dataset as the model will see them, those that are trained on coloured.

Needs the tokenizer only, never the model's weights, and writes nothing to the run directory but its report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from finetune_api.runconfig import resolve
from finetune_trainer.context import RunContext
from finetune_trainer.data.chat import ChatFormat, LabelledTokens
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.render import Rendered, Rendering, render_training
from finetune_trainer.prepare.facts import data_notes
from finetune_trainer.prepare.fetched import read_fetched
from finetune_trainer.prepare.gate_check import check_gate, rows_to_measure
from finetune_trainer.prepare.inputs import open_datasets
from finetune_trainer.prepare.mixture import SplitAssignment, assign_splits
from finetune_trainer.prepare.models import load_config, locate_model
from finetune_trainer.prepare.reuse import config_digest
from finetune_trainer.prepare.scan import scan_all
from finetune_trainer.prepare.tokenizer import document_limit, open_chat
from finetune_trainer.prepare.workers import Workers
from finetune_trainer.prepare.write import rendering_of

EXAMPLES = 3
TRAINED = "bold green"
CONTEXT = "dim"
OPEN, CLOSE = "⟦", "⟧"
"""Around tokens that are trained on where there are no colours."""


def run(context: RunContext, console: Console | None = None) -> None:
    """Print examples of every dataset. Raises TrainerError as Prepare does; about the gate after the examples."""
    console = console or Console()
    fetched = read_fetched(context, config_digest(context.config))
    spec = resolve(context.config.spec)
    dataset_readers = open_datasets(context, spec, fetched)
    local = locate_model(spec.model, fetched, context.resolve_source, context.cache, convert=False)
    _, chat = open_chat(context, spec, local)
    most = spec.training.max_sequence_length
    if local.directory.is_dir():
        config = load_config(local.directory, trust_remote_code=spec.model.trust_remote_code)
        most = document_limit(context, spec, config)
    with Workers() as workers:
        scans = scan_all(dataset_readers, spec.split.seed, workers)
    # rich ends the process where the reader of a pipe has seen enough (`finetune preview … | head`): no failure.
    assignments = assign_splits(scans, spec)
    with suppress(SystemExit):
        _show_all(context, console, assignments, chat, most)
    renderings = {one.reader.name: rendering_of(one, chat, most) for one in assignments}
    measured = {one.reader.name: rows_to_measure(one, renderings[one.reader.name]) for one in assignments}
    check_gate(spec, scans, assignments, measured)


def _show_all(
    context: RunContext, console: Console, assignments: Sequence[SplitAssignment], chat: ChatFormat, most: int
) -> None:
    for assignment in assignments:
        _show(console, assignment, rendering_of(assignment, chat, most))
    for name, choice in context.reporter.report.choices.items():
        console.print(Text(f"{name}: {choice.value!r} ({choice.why})", style=CONTEXT))
    for warning in context.reporter.report.warnings:
        console.print(Text(warning, style="yellow"))
    legend = Text("Green", style=TRAINED) if _coloured(console) else Text(f"{OPEN}…{CLOSE}")
    console.print(Text.assemble(legend, " = trained on; everything else is context."))


def _show(console: Console, assignment: SplitAssignment, rendering: Rendering) -> None:
    sides = f"{assignment.count('train'):,} rows for training, {assignment.count('validation'):,} for validation"
    if assignment.evaluation != "none":
        sides += f", {assignment.measured:,} for evaluation ({assignment.evaluation})"
    console.rule(f"{assignment.reader.name}: {assignment.reader.task.value}", align="left")
    console.print(f"{sides}. {assignment.reader.source.origin}", highlight=False, soft_wrap=True)
    for note in data_notes(assignment):
        console.print(Text(f"- {note}", style=CONTEXT), soft_wrap=True)
    for warning in assignment.warnings:
        console.print(Text(f"- {warning}", style="yellow"), soft_wrap=True)
    for row, rendered in _examples(assignment, rendering):
        if isinstance(rendered, str):
            console.print(Text(f"- row {row} cannot be used: {rendered}", style="yellow"), soft_wrap=True)
            continue
        tokens = rendered.documents[0]
        text = coloured(tokens, rendering.format.tokenizer, marks=not _coloured(console))
        title = f"row {row}: {len(tokens.ids):,} tokens, {len(tokens.target_id):,} trained on"
        console.print(Panel(text, title=title, title_align="left"))
        for note in sorted(rendered.notes):
            console.print(Text(f"- row {row}: {note}", style=CONTEXT), soft_wrap=True)


def _examples(assignment: SplitAssignment, rendering: Rendering) -> Iterator[tuple[int, Rendered | str]]:
    """The first training rows by rank, until enough of them could be rendered, or why one could not be."""
    split = assignment.reader.spec.splits.train
    scan = assignment.scans[split]
    order = sorted((scan.ranks[i], scan.rows[i]) for i, side in enumerate(assignment.sides[split]) if side == "train")
    wanted = {row for _, row in order[: 4 * EXAMPLES]}
    shown = refused = 0
    for example in assignment.reader.examples(scan.split, wanted):
        if shown == EXAMPLES:
            return
        try:
            rendered = render_training(rendering, example)
        except BadRowError as error:
            refused += 1
            if refused <= EXAMPLES:
                yield example.row, str(error)
            continue
        if rendered.documents:
            shown += 1
            yield example.row, rendered


def coloured(tokens: LabelledTokens, tokenizer: object, *, marks: bool = False) -> Text:
    """The document's text; tokens that are trained on in colour, or with `marks` in brackets."""
    trained = {position + 1 for position in tokens.target_position}
    text = Text()
    for is_trained, run_of in groupby(enumerate(tokens.ids), key=lambda pair: pair[0] in trained):
        decoded = str(tokenizer.decode([token for _, token in run_of]))  # type: ignore[attr-defined]
        if is_trained and marks:
            decoded = f"{OPEN}{decoded}{CLOSE}"
        text.append(decoded, style=TRAINED if is_trained else CONTEXT)
    return text


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color
