"""`finetune preview FILE`: examples as the model sees them, rendered by the trainer itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_operator.commands.run import AllowEnv
from finetune_operator.errors import EXIT_BAD_SPEC, EXIT_FAILED, UserError, debugging

if TYPE_CHECKING:
    from finetune_operator.local.jobfile.job_file import JobFile
    from finetune_operator.local.processes.tokens import Tokens
    from finetune_operator.programs import Program

TERMINATION_FILE = "termination.json"
LOG_FILE = "preview.log"


def preview(
    file: Annotated[str, typer.Argument(help="File with one FineTuneJob; - reads standard input.", metavar="FILE")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field, as in finetune run.", metavar="PATH=VALUE")
    ] = None,
    allow_env: AllowEnv = None,
) -> None:
    """Show three examples per task as the model sees them, with the trained tokens highlighted.

    Downloads the tokenizer and the data into FINETUNE_CACHE. Trains nothing.
    """
    from finetune_operator.commands.run import require_trainer
    from finetune_operator.local.jobfile import job_file
    from finetune_operator.local.processes.environment import check_variables

    require_trainer("preview")
    loaded = job_file.load(file, overrides or [])
    check_variables(loaded.job.spec, allow_env or [])
    with tempfile.TemporaryDirectory(prefix="finetune-preview-") as directory:
        run = Path(directory)
        if _preview(loaded, run) != 0:
            raise _failure(run)


def _preview(loaded: JobFile, run: Path) -> int:
    """Run the trainer's preview with a run directory of its own and this terminal; returns the exit code."""
    from finetune_api.base import Stage
    from finetune_api.files import write_json
    from finetune_api.runconfig import (
        RUN_CONFIG_FILE,
        TERMINATION_VARIABLE,
        Attempt,
        JobRef,
        Paths,
        RunConfig,
        resolve,
    )
    from finetune_operator.commands.run import cache_directory
    from finetune_operator.devices import cores, loopback_interface
    from finetune_operator.local.processes.environment import environment
    from finetune_operator.local.processes.placement import Node
    from finetune_operator.local.processes.tokens import tokens_of, without_secrets
    from finetune_operator.programs import preview_programs

    metadata, cache = loaded.job.metadata, cache_directory()
    spec = resolve(loaded.job.spec)
    config = RunConfig(
        job=JobRef(namespace=metadata.namespace, name=metadata.name, uid="preview"),
        spec=spec,
        paths=Paths(run=str(run), cache=str(cache), source=str(loaded.source)),
    )
    write_json(run / RUN_CONFIG_FILE, config.to_wire())
    programs = preview_programs(spec)
    variables = environment(
        without_secrets(os.environ),
        Node(programs, threads=cores()),
        Attempt(uid="preview", stage=Stage.PREPARE),
        spec,
        config_file=str(run / RUN_CONFIG_FILE),
        cache=str(cache),
        interface=loopback_interface(),
    )
    variables[TERMINATION_VARIABLE] = str(run / TERMINATION_FILE)
    tokens = tokens_of(os.environ)
    codes = (_run_program(program, variables, tokens, run) for program in programs)
    return next((code for code in codes if code != 0), 0)


def _run_program(program: Program, variables: dict[str, str], tokens: Tokens, run: Path) -> int:
    """Run one program with its own token; returns its exit code."""
    from finetune_api.runconfig import TOKENS_VARIABLE
    from finetune_operator.local.processes.tokens import remove_tokens, write_tokens

    directory = write_tokens(tokens, program.token)
    environ = variables | program.variables | {TOKENS_VARIABLE: str(directory)}
    try:
        with (run / LOG_FILE).open("ab") as log:
            stderr = None if debugging() else log
            return subprocess.run(program.command(sys.executable), env=environ, stderr=stderr, check=False).returncode
    finally:
        remove_tokens(str(directory))


def _failure(run: Path) -> UserError:
    """The trainer's error as the command's own."""
    from finetune_api.report import Failure, FailureClass

    try:
        failure = Failure.model_validate_json((run / TERMINATION_FILE).read_text())
    except (OSError, ValueError):
        lines = (run / LOG_FILE).read_text(errors="replace").strip().splitlines()
        return UserError(f"The preview failed: {lines[-1] if lines else 'no error message'}.", EXIT_FAILED)
    where = f"{failure.field}: " if failure.field and failure.field not in failure.sentence else ""
    of_the_user = failure.failure_class in (FailureClass.BAD_SPEC, FailureClass.BAD_DATA)
    return UserError(f"{where}{failure.sentence}", EXIT_BAD_SPEC if of_the_user else EXIT_FAILED)
