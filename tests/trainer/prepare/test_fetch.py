"""What `fetch` leaves is all that Prepare and the preview need: neither has a token, or reaches the Hub."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.support.hub_job import ROWS, SPEC, tiny_model
from tests.support.hub_server import HubServer, hub_in_this_process
from tests.support.prepare_runs import prepare_context

from finetune_api.files import write_json
from finetune_api.report import FailureClass
from finetune_api.runconfig import FENCE_FILE
from finetune_trainer.context import RunContext
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import fetch, preview, stage
from finetune_trainer.prepare.fetched import FETCHED_FILE, is_inside
from finetune_trainer.prepare.hub import Hub

TOKEN = "hf_alice_reads"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(tmp_path: Path, model: Path) -> Iterator[HubServer]:
    with HubServer() as server, hub_in_this_process(server, tmp_path / "home"):
        server.add_token(TOKEN, user="alice")
        server.add_repo("meta/tiny", model, gated=True, consented=("alice",))
        server.add_repo("acme/rows", {"train.csv": ROWS, "README.md": "---\nlicense: mit\n---\n"}, kind="datasets")
        yield server


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return prepare_context(tmp_path, SPEC, token=TOKEN)


def without_token(context: RunContext) -> RunContext:
    return replace(context, tokens=None)


def refused(run: Callable[[], object]) -> TrainerError:
    with pytest.raises(TrainerError) as error:
        run()
    return error.value


def test_after_fetch_a_gated_model_is_prepared_without_a_token_and_without_the_hub(
    hub: HubServer, context: RunContext
) -> None:
    fetch.run(context)
    hub.stop()
    stage.run(without_token(context))
    assert PreparedManifest.read(context.prepared).datasets[0].train == 32


def test_the_preview_needs_no_weights(hub: HubServer, context: RunContext) -> None:
    fetch.run_for_preview(context)
    assert not hub.seen("GET", r"/resolve/.*\.safetensors")
    hub.stop()
    preview.run(without_token(context), Console(file=(out := io.StringIO()), width=200))
    assert "rows: classification" in out.getvalue()


def test_what_is_prepared_is_not_fetched_again(hub: HubServer, context: RunContext, tmp_path: Path) -> None:
    fetch.run(context)
    stage.run(without_token(context))
    before = len(hub.requests)
    again = prepare_context(tmp_path, SPEC, number=2, token=TOKEN)
    fetch.run(again)
    stage.run(without_token(again))
    assert len(hub.requests) == before


def test_what_may_not_be_read_is_told_before_anything_large_is_downloaded(
    hub: HubServer, context: RunContext, tmp_path: Path
) -> None:
    hub.add_repo("acme/gated", {"train.csv": ROWS}, kind="datasets", gated=True)
    spec = SPEC | {"datasets": [*SPEC["datasets"], SPEC["datasets"][0] | {"name": "gated", "repo": "acme/gated"}]}
    error = refused(lambda: fetch.run(prepare_context(tmp_path, spec, token=TOKEN)))
    assert (error.failure_class, error.field) == (FailureClass.NO_ACCESS, "datasets[1].repo")
    assert not hub.seen("GET", r"/resolve/.*(safetensors|csv)")


def change(**fields: Any) -> Callable[[RunContext], None]:
    """Overwrite fields of the hand-over."""

    def write(context: RunContext) -> None:
        path = context.run / FETCHED_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def change_model(**fields: Any) -> Callable[[RunContext], None]:
    def write(context: RunContext) -> None:
        repos = json.loads((context.run / FETCHED_FILE).read_text())["repos"]
        change(repos=repos | {"model": repos["model"] | fields})(context)

    return write


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda context: (context.run / FETCHED_FILE).unlink(), "fetched.json is missing or damaged"),
        (lambda context: (context.run / FETCHED_FILE).write_text("[" * 100_000), "is missing or damaged"),
        (change(attempt="uid-1/prepare/7"), "was written by attempt uid-1/prepare/7"),
        (change(configDigest="other"), "was written by attempt uid-1/prepare/1"),
        (change(repos={}), "nothing was fetched for datasets[0]"),
        (change(surprise=1), "is missing or damaged"),
        (change_model(directory="../../home"), "is missing or damaged"),
        (change_model(files=["config.json", "/etc/passwd"]), "is missing or damaged"),
        (change_model(files=["gone.json"]), "gone.json of meta/tiny is not in the cache any more"),
    ],
)
def test_prepare_refuses_what_is_not_there_and_the_next_attempt_fetches_it_again(
    hub: HubServer, context: RunContext, tmp_path: Path, spoil: Callable[[RunContext], object], why: str
) -> None:
    fetch.run(context)
    spoil(context)
    error = refused(lambda: stage.run(without_token(context)))
    assert error.failure_class is FailureClass.CRASH
    assert why in error.sentence
    again = prepare_context(tmp_path, SPEC, number=2, token=TOKEN)
    fetch.run(again)
    stage.run(without_token(again))


def test_an_attempt_that_was_overtaken_hands_over_nothing_and_takes_over_nothing(
    hub: HubServer, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = {"attempt": "uid-1/prepare/2"}
    download = Hub.download

    def overtaken(*arguments: Any) -> Path:
        write_json(context.run / FENCE_FILE, newer)
        return download(*arguments)

    monkeypatch.setattr(Hub, "download", overtaken)
    assert refused(lambda: fetch.run(context)).failure_class is FailureClass.FENCED
    assert not (context.run / FETCHED_FILE).exists()
    assert refused(lambda: stage.run(without_token(context))).failure_class is FailureClass.FENCED
    assert json.loads((context.run / FENCE_FILE).read_text()) == newer


@pytest.mark.parametrize("name", ["../../outside.csv", "a/../../outside.csv", "/etc/outside.csv", "a//b.csv"])
def test_a_repository_whose_files_would_lie_outside_of_it_is_refused(
    hub: HubServer, context: RunContext, name: str
) -> None:
    hub.push(hub.repo("acme/rows", "datasets"), {name: ROWS})
    error = refused(lambda: fetch.run(context))
    assert (error.failure_class, error.field) == (FailureClass.BAD_DATA, "datasets[0].repo")
    assert not is_inside(name)
    assert not hub.seen("GET", "/resolve/")


def test_a_repository_of_endless_files_is_refused(
    hub: HubServer, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.prepare.hub.MOST_FILES", 3)
    error = refused(lambda: fetch.run(context))
    assert "The model meta/tiny has more than 3 files" in error.sentence


def test_fetch_does_not_load_what_parses_models_and_data() -> None:
    parsers = ("pyarrow", "jinja2", "transformers", "tokenizers", "safetensors", "torch", "numpy", "pandas")
    program = f"import sys, finetune_trainer.prepare.fetch; print([m for m in {parsers} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
