"""`finetune`: the edge at which every error becomes one sentence and an exit code.

Commands are imported when they are called, so that `finetune --help` is quick and a missing extra matters only to the
commands that need it. A command registers itself with one line in `COMMANDS`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from finetune_api import INSTALL
from finetune_operator.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError, say_error

HERE = "On this machine"
CLUSTER = "On a cluster"
RESOURCE = "Job files"


class Entry(NamedTuple):
    """One command: its help line, its panel, and the extra of the distribution that it needs."""

    help: str
    panel: str
    extra: str = ""


COMMANDS: dict[str, Entry] = {
    "run": Entry("Run a FineTuneJob on this machine.", HERE, "trainer"),
    "plan": Entry("Estimate what a job needs: memory per rank, steps, time and cost.", HERE),
    "preview": Entry("Show examples as the model sees them, with the trained tokens highlighted.", HERE, "trainer"),
    "validate": Entry("Validate FineTuneJob files and suggest corrections for misspelt fields.", RESOURCE),
    "crd": Entry("Print the CustomResourceDefinition.", RESOURCE),
    "render": Entry("Print the manifests that the operator would create for a job.", RESOURCE),
    "submit": Entry("Apply a FineTuneJob to the cluster.", CLUSTER, "operator"),
    "list": Entry("List FineTuneJobs.", CLUSTER, "operator"),
    "watch": Entry("Follow a job in the live view of `run`.", CLUSTER, "operator"),
    "wait": Entry("Wait until a job is complete or has failed.", CLUSTER, "operator"),
    "logs": Entry("Print pod logs.", CLUSTER, "operator"),
    "suspend": Entry("Suspend a job: save a checkpoint, stop, and release its GPUs.", CLUSTER, "operator"),
    "resume": Entry("Resume a suspended job.", CLUSTER, "operator"),
    "retry": Entry("Retry the failed stage of a job.", CLUSTER, "operator"),
    "operator": Entry("Run the operator.", CLUSTER, "operator"),
    "version": Entry("Print the version.", RESOURCE),
}


def load(name: str) -> Any:
    """The command `name`, imported now. Raises UserError if the extra that it needs is not installed."""
    with _missing_extra(name):
        function = getattr(importlib.import_module(f"finetune_operator.commands.{name}"), name.replace("-", "_"))
    app = typer.Typer(add_completion=False)
    paragraphs = (inspect.getdoc(function) or COMMANDS[name].help).split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the help wraps them to the terminal
    app.command(name, help=text)(_runnable(name, function))
    return get_command(app)


@contextmanager
def _missing_extra(name: str) -> Iterator[None]:
    """Raises UserError, with what to install, for a package that is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("finetune_operator", "finetune_api"):
            raise
        extra = COMMANDS[name].extra or "operator"
        raise UserError(
            f"finetune {name} needs {package}, which is not installed: {INSTALL.format(extra=extra)}."
        ) from error


def _runnable(name: str, command: Callable[..., Any]) -> Callable[..., Any]:
    """The command as a plain function: a coroutine gets an event loop."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        with _missing_extra(name):
            if not inspect.iscoroutinefunction(command):
                return command(*arguments, **options)
            import asyncio

            return asyncio.run(command(*arguments, **options))

    return run


class LazyGroup(TyperGroup):
    """Lists the commands from `COMMANDS` and imports one only when it is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {
            name: TyperCommand(name, help=entry.help, rich_help_panel=entry.panel) for name, entry in COMMANDS.items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of its stand-in, which has a name and a help line."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else None, rest


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    help="Fine-tune a language model with one resource, and measure whether it got better.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        load("version").callback()
        raise typer.Exit


@app.callback()
def _finetune(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
) -> None:
    """Only for the help: `run_command_line` removes `--debug` wherever it stands."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run_command_line(sys.argv[1:] if arguments is None else arguments))


def run_command_line(arguments: list[str]) -> int:
    """Run one command; returns the exit code and prints the sentence of whatever went wrong."""
    # `--debug` is accepted anywhere, because people append it to the previous command.
    debug = "--debug" in arguments
    if debug:
        os.environ["FINETUNE_DEBUG"] = "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = get_command(app).main(arguments, prog_name="finetune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            # The reader (`| head`) closed the pipe: not an error, but nothing more may be printed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if debug:
            raise
        sentence, code = explain(error)
        if sentence:
            say_error(sentence)
        return code


def explain(error: BaseException) -> tuple[str, int]:
    """Sentence and exit code for whatever a command raised."""
    if isinstance(error, UserError):
        return error.sentence, error.exit_code
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", EXIT_INTERRUPTED
    if hasattr(error, "format_message"):  # typer's own: a wrong option, a missing argument
        sentence = error.format_message()
        lost = sentence.startswith("No such command") and "Did you mean" not in sentence
        return f"{sentence} See `finetune --help`." if lost else sentence, getattr(error, "exit_code", 2)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}.", EXIT_FAILED
    return f"{type(error).__name__}: {error} (run with --debug for a traceback).", EXIT_FAILED
