"""`finetune preview`: three examples of each dataset as the model will see them, the learnt tokens coloured.

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
from finetune_trainer.data.chat import ChatFormat, Tokens
from finetune_trainer.data.examples import BadRowError
from finetune_trainer.data.render import Rendering, render_training
from finetune_trainer.prepare.fetch import hub_of, open_datasets
from finetune_trainer.prepare.mixture import Division, divide
from finetune_trainer.prepare.models import fetch_model, load_config
from finetune_trainer.prepare.scan import scan_all
from finetune_trainer.prepare.stage import selects
from finetune_trainer.prepare.tokenizer import document_limit, open_chat
from finetune_trainer.prepare.workers import Workers
from finetune_trainer.prepare.write import rendering_of

EXAMPLES = 3
LEARNT = "bold green"
GIVEN = "dim"
OPEN, CLOSE = "⟦", "⟧"
"""Around learnt tokens where there are no colours."""


def run(context: RunContext, console: Console | None = None) -> None:
    """Print examples of every dataset. Raises TrainerError as Prepare does."""
    console = console or Console()
    hub = hub_of(context)
    spec = resolve(context.config.spec)
    readings = open_datasets(context, spec, hub)
    local = fetch_model(spec.model, hub, context.resolve_source, context.cache, weights=False)
    _, chat = open_chat(context, spec, local)
    most = spec.training.max_sequence_length
    if local.directory.is_dir():
        config = load_config(local.directory, trust_remote_code=spec.model.trust_remote_code)
        most = document_limit(context, spec, config)
    with Workers() as workers:
        scans = scan_all(readings, spec.split.seed, workers)
    # rich ends the process where the reader of a pipe has seen enough (`finetune preview … | head`): no failure.
    divisions = divide(scans, spec.split, selects=selects(spec), max_rows=spec.evaluation.max_rows)
    with suppress(SystemExit):
        _show_all(context, console, divisions, chat, most)


def _show_all(
    context: RunContext, console: Console, divisions: Sequence[Division], chat: ChatFormat, most: int
) -> None:
    for division in divisions:
        _show(console, division, rendering_of(division, chat, most))
    for name, choice in context.reporter.report.choices.items():
        console.print(Text(f"{name}: {choice.value!r} ({choice.why})", style=GIVEN))
    for warning in context.reporter.report.warnings:
        console.print(Text(warning, style="yellow"))
    legend = Text("learnt", style=LEARNT) if _coloured(console) else Text(f"{OPEN}learnt{CLOSE}")
    console.print(Text.assemble("Tokens that are ", legend, "; all others are given."))


def _show(console: Console, division: Division, how: Rendering) -> None:
    sides = f"{division.count('train')} to train on, {division.count('validation')} for validation"
    if division.evaluation != "none":
        scored = len(division.scored) if division.scored is not None else division.count(division.scored_side)
        sides += f", {scored} to measure ({division.evaluation})"
    console.rule(f"{division.reading.name}: {division.reading.task.value}", align="left")
    console.print(f"{sides}. {division.reading.source.origin}", highlight=False, soft_wrap=True)
    for row, tokens in _examples(division, how):
        text = coloured(tokens, how.format.tokenizer, marks=not _coloured(console))
        title = f"row {row}: {len(tokens.ids)} tokens, {len(tokens.target_id)} learnt"
        console.print(Panel(text, title=title, title_align="left"))


def _examples(division: Division, how: Rendering) -> Iterator[tuple[int, Tokens]]:
    """The first documents of the first training rows by rank that can be rendered."""
    split = division.reading.spec.splits.train
    scan = division.scans[split]
    order = sorted((scan.ranks[i], scan.rows[i]) for i, side in enumerate(division.sides[split]) if side == "train")
    wanted = {row for _, row in order[: 4 * EXAMPLES]}
    shown = 0
    for example in division.reading.examples(scan.split, wanted):
        try:
            documents = render_training(how, example).documents
        except BadRowError:
            continue
        if shown < EXAMPLES and documents:
            shown += 1
            yield example.row, documents[0]


def coloured(tokens: Tokens, tokenizer: object, *, marks: bool = False) -> Text:
    """The document's text; learnt tokens in colour, or with `marks` in brackets."""
    learnt = {position + 1 for position in tokens.target_position}
    text = Text()
    for is_learnt, run_of in groupby(enumerate(tokens.ids), key=lambda pair: pair[0] in learnt):
        decoded = str(tokenizer.decode([token for _, token in run_of]))  # type: ignore[attr-defined]
        if is_learnt and marks:
            decoded = f"{OPEN}{decoded}{CLOSE}"
        text.append(decoded, style=LEARNT if is_learnt else GIVEN)
    return text


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color
