"""The edge: help without imports, one sentence for every error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.time_limits import scaled

from finetune_operator import cli, commands
from finetune_operator.errors import UserError


def test_help_lists_the_commands_without_importing_them() -> None:
    code = (
        "import sys; from finetune_operator.cli import run_command_line; run_command_line(['--help']);"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in ('torch', 'pydantic', 'kopf', 'kubernetes')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Run a FineTuneJob on this machine." in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_each_command_has_a_module_and_each_module_a_command() -> None:
    modules = {path.stem for path in Path(commands.__file__).parent.glob("[!_]*.py")}
    assert modules == {name.replace("-", "_") for name in cli.COMMANDS}


def test_every_command_that_exists_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.LazyGroup().list_commands(None):
        assert cli.run_command_line([name, "--help"]) == 0
        assert "Usage: finetune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["rnu"], "Did you mean 'run'"),
        (["train"], "No such command 'train'. See `finetune --help`."),
        (["run"], "Missing argument 'FILE'"),
        (["run", "x.yaml", "--outptu", "json"], "No such option: --outptu"),
        (["run", "/nowhere/x.yaml"], "File /nowhere/x.yaml does not exist."),
        (["run", "/"], "/ is a directory; pass a file."),
        (["plan", "x.yaml", "--set", "epochs"], "File x.yaml does not exist."),
        (["render", "/"], "/ is a directory; pass a file."),
    ],
)
def test_a_wrong_line_is_one_sentence_and_code_2(
    line: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command_line(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    program = f"{sys.executable} -c 'from finetune_operator.cli import main; main()' crd | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True, timeout=scaled(60)
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (UserError("The field x is wrong.", 3), "The field x is wrong.", 3),
        (KeyboardInterrupt(), "Interrupted.", 130),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory.", 1),
        (
            ZeroDivisionError("division by zero"),
            "ZeroDivisionError: division by zero (run with --debug for a traceback).",
            1,
        ),
    ],
)
def test_whatever_is_raised_becomes_a_sentence_and_a_code(error: BaseException, sentence: str, code: int) -> None:
    assert cli.explain(error) == (sentence, code)


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DEBUG", "")
    with pytest.raises(UserError):
        cli.run_command_line(["run", "/nowhere/x.yaml", "--debug"])


def test_the_version_is_an_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert [cli.run_command_line([word]) for word in ("version", "--version")] == [0, 0]
    first, second = capsys.readouterr().out.split()
    assert first == second


def test_a_client_that_is_missing_is_said_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.delitem(sys.modules, "finetune_operator.cluster.access", raising=False)
    assert cli.run_command_line(["list"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "error: finetune list needs kubernetes, which is not installed: "
        "pip install 'finetune-operator[operator] @ git+https://git.example.com/ml/finetune-operator.git'.\n"
    )


def test_a_missing_extra_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'kopf'", name="kopf")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"needs kopf, .*finetune-operator\[operator\]"):
        cli.load("operator")
