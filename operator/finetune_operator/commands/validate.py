"""`finetune validate FILE…`: the checks of the API server, without one."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from finetune_api.validate import Checked, Problem, check
from finetune_operator.errors import EXIT_BAD_SPEC, UserError
from finetune_operator.inputs import read_text, source_name


def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="Files with FineTuneJobs; - reads standard input.")
    ],
    output: Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="Output format.")] = "text",
) -> None:
    """Validate files like the API server would, and suggest corrections."""
    results = {name: _checked(name) for name in files}
    if output == "json":
        print(json.dumps({name: _as_json(checked) for name, checked in results.items()}, indent=2, ensure_ascii=False))
    else:
        for name, checked in results.items():
            _print(name, checked)
    if any(checked.problems for checked in results.values()):
        raise SystemExit(EXIT_BAD_SPEC)


def _checked(file: str) -> Checked:
    """The problems of a file; one that cannot be read does not stop the others from being checked."""
    try:
        return check(read_text(file))
    except UserError as error:
        return Checked(problems=[Problem(0, "", None, error.sentence)])


def _as_json(checked: Checked) -> dict[str, object]:
    return {
        "valid": [job.metadata.name for job in checked.jobs],
        "problems": [vars(problem) for problem in checked.problems],
        "notes": checked.notes,
    }


def _print(name: str, checked: Checked) -> None:
    out, err = Console(soft_wrap=True, highlight=False), Console(soft_wrap=True, highlight=False, stderr=True)
    source = source_name(name)
    for problem in checked.problems:
        err.print(_line(source, problem))
    for note in checked.notes:
        err.print(Text(f"{source}: {note}", style="dim"))
    for job in checked.jobs:
        out.print(Text.assemble(f"{source}: {job.metadata.name} ", ("is valid", "green")))


def _line(source: str, problem: Problem) -> Text:
    place = source if problem.line is None else f"{source}:{problem.line}"
    parts = [
        (f"{place}: ", "dim"),
        (problem.path, "bold"),
        (": " if problem.path else "", ""),
        (problem.sentence, "red"),
    ]
    hint = f" ({problem.hint})" if problem.hint else ""
    return Text.assemble(*parts, (hint, "cyan"))
