"""The trainer's own edge: whatever goes wrong before or beside a stage is a sentence and a class, never a traceback."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from tests.support.prepare_runs import labelled, prepare_context, write_rows
from tests.support.time_limits import scaled
from tests.support.tiny import tiny_llama

from finetune_api.base import Stage
from finetune_api.report import EXIT_CODES, Failure, FailureClass, Report
from finetune_api.runconfig import Attempt
from finetune_trainer import failures
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.failures import TrainerError, classify
from finetune_trainer.prepare import stage
from finetune_trainer.reporter import Reporter

SPEC = {"datasets": [{"name": "a", "path": "a.csv", "task": "classification"}]}


def environment(work: Path, stage: Stage, **spec: object) -> dict[str, str]:
    """What a process of that stage is given; `spec` are further blocks of the job's."""
    context = prepare_context(work, SPEC | spec)
    (work / "run-config.json").write_text(json.dumps(context.config.to_wire()))
    (work / "termination").touch()
    return {
        "FINETUNE_RUN_CONFIG": str(work / "run-config.json"),
        "FINETUNE_ATTEMPT": Attempt(uid="uid-1", stage=stage).model_dump_json(by_alias=True),
        "FINETUNE_TERMINATION_LOG": str(work / "termination"),
    }


def started(arguments: list[str], given: dict[str, str]) -> tuple[int, str, Failure]:
    """Exit code, what was said, and the termination message."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FINETUNE_")}
    command = [sys.executable, "-m", "finetune_trainer", *arguments]
    done = subprocess.run(
        command, env=environ | given, capture_output=True, text=True, timeout=scaled(120), check=False
    )
    message = Path(given["FINETUNE_TERMINATION_LOG"]).read_text()
    return done.returncode, done.stderr, Failure.model_validate_json(message)


@pytest.mark.parametrize("arguments", [["publish"], ["launch", "train"]])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            "no variable",
            "FINETUNE_RUN_CONFIG is not set. Start the trainer with `finetune run` or through the",
        ),
        ("no file", "run-config.json cannot be read: No such file or directory."),
        ("another version", "RunConfig, spec.novelty: Extra inputs are not permitted). Use the trainer image of"),
    ],
)
def test_a_run_config_that_is_none_is_told_to_the_kubelet(
    tmp_path: Path, arguments: list[str], fault: str, says: str
) -> None:
    given = environment(tmp_path, Stage.PUBLISH)
    config = tmp_path / "run-config.json"
    if fault == "no variable":
        del given["FINETUNE_RUN_CONFIG"]
    elif fault == "no file":
        config.unlink()
    else:
        wire = json.loads(config.read_text())
        wire["spec"]["novelty"] = True
        config.write_text(json.dumps(wire))
    code, said, failure = started(arguments, given)
    assert (code, failure.failure_class) == (EXIT_CODES[FailureClass.BAD_SPEC], FailureClass.BAD_SPEC)
    assert says in failure.sentence
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize("arguments", [["publish"], ["launch", "train"]])
def test_a_volume_that_takes_no_logs_still_leaves_a_termination_message(tmp_path: Path, arguments: list[str]) -> None:
    given = environment(tmp_path, Stage.PUBLISH)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").touch()  # no directory can be made there
    code, _, failure = started(arguments, given)
    assert code == EXIT_CODES[failure.failure_class]
    assert "logs" in failure.sentence


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_process_imports_no_library_that_its_job_has_no_use_for(tmp_path: Path, method: str) -> None:
    given = environment(tmp_path, Stage.TRAIN, tuning={"method": method}, topology={"gpusPerNode": 0})
    program = (
        "import sys; from finetune_trainer.__main__ import main; main(['train']); import peft\n"
        "from finetune_trainer.versions import versions\n"
        "found = [name for name in ('bitsandbytes', 'triton', 'scipy') if sys.modules.get(name)]\n"
        "print(*found, versions()['bitsandbytes'])"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FINETUNE_")} | given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=scaled(120)
    )
    installed = version("bitsandbytes")
    assert done.stdout.split() == ([installed] if method == "lora" else ["bitsandbytes", installed]), done.stderr


def test_prepare_gets_by_without_torch_and_prepares_the_same(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny")
    write_rows(tmp_path / "a.jsonl", labelled(30))
    spec = {"datasets": [{"name": "a", "path": "a.jsonl", "task": "classification"}]}
    given = environment(tmp_path, Stage.PREPARE, **spec)
    program = (
        "import sys; from finetune_trainer.__main__ import main; print(main(['prepare']), sys.modules.get('torch'))"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FINETUNE_")} | given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=scaled(120)
    )
    assert done.stdout.split() == ["0", "None"], done.stderr
    without = PreparedManifest.read(tmp_path / "run" / "prepared")
    shutil.rmtree(tmp_path / "run" / "prepared")
    stage.run(prepare_context(tmp_path, spec))
    assert PreparedManifest.read(tmp_path / "run" / "prepared").digest == without.digest


@pytest.mark.parametrize("around", ["", "x", "user:", "ab"])
def test_a_token_is_removed_in_the_forms_that_urls_and_headers_give_it(
    monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    monkeypatch.setattr(failures, "_known_secrets", set())
    token = "s3cret/With+Odd=Characters&more"
    failures.register_secret(token)
    encoded = base64.b64encode(f"{around}{token}{around}".encode()).decode()
    text = failures.redact(f"{token} {quote(token, safe='')} {quote_plus(token)} Basic {encoded}")
    assert text.count("[redacted]") == 4
    assert not any(part in text for part in ("s3cret", "Odd", encoded[8:-8]))


def test_halves_of_characters_do_not_keep_a_failure_from_being_told(tmp_path: Path) -> None:
    reporter = Reporter(Attempt(uid="uid-1", stage=Stage.PREPARE), tmp_path, enabled=True)
    reporter.warn("row 3 holds \udcff")
    reporter.activity("reading \udcff.csv")
    reporter.choose("dialect", "\ud800", "\ud800 closes no field")
    reporter.fail(classify(TrainerError(FailureClass.BAD_DATA, "a.csv: \ud800 is no text", "datasets[\udcff]")))
    told = Report.model_validate_json((tmp_path / "prepare-1.json").read_text())
    assert told.failure is not None
    assert told.failure.sentence == "a.csv: \\ud800 is no text"
    assert told.warnings == ["row 3 holds \\udcff"]
