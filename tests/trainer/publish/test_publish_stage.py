"""Publish: only what was evaluated and is better, in one commit, once, whatever the network does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.evaluation_runs import EvaluationRun
from tests.support.hub_server import HubServer

from finetune_api.base import Stage
from finetune_api.files import write_json
from finetune_api.report import FailureClass, Published, Results
from finetune_trainer.context import RunContext
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import sha256_of
from finetune_trainer.publish import hub as publish_hub
from finetune_trainer.publish import stage

Runs = Callable[..., EvaluationRun]
Tokens = Callable[[str], Path]
WRITER = "hf_writer0001"


class RecordedTime:
    """The time module of a client whose pauses are recorded, not made."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.sleep = self.pauses.append

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Our own pauses; those of the client are not made either."""
    ours = RecordedTime()
    monkeypatch.setattr("huggingface_hub.utils._http.time", RecordedTime())
    monkeypatch.setattr(publish_hub, "time", ours)
    return ours.pauses


def publish(run: EvaluationRun, tokens: Path | None) -> Published:
    stage.run(run.context(Stage.PUBLISH, tokens=tokens))
    published = run.report(Stage.PUBLISH).published
    assert published is not None
    return published


def refusal(call: Callable[[RunContext], None], context: RunContext) -> TrainerError:
    with pytest.raises(TrainerError) as refused:
        call(context)
    return refused.value


def digest_of(run: EvaluationRun) -> str:
    return Results.model_validate_json((run.path / "evaluation/results.json").read_text()).export_digest


# -- what arrives -----------------------------------------------------------------------------------------------


def test_the_evaluated_files_and_a_card_arrive_in_one_private_commit(
    hub: HubServer, published_run: Runs, tokens: Tokens
) -> None:
    run = published_run(repo="acme/weather")
    published = publish(run, tokens(WRITER))
    repo = hub.repo("acme/weather")
    assert repo.private
    assert published.commit == repo.head.id
    assert published.digest == digest_of(run)
    assert published.url == f"{hub.url}/acme/weather/tree/{published.commit}"
    export = {p.name: p.read_bytes() for p in (run.path / "export").iterdir()}
    assert {name: repo.files[name] for name in export} == export
    assert len(hub.seen("POST", "/commit/")) == 1
    assert set(repo.files) - set(export) == {"README.md", ".gitattributes"}


def test_publishing_again_gives_the_same_commit(hub: HubServer, published_run: Runs, tokens: Tokens) -> None:
    run = published_run(repo="acme/weather")
    first = publish(run, tokens(WRITER))
    assert publish(run, tokens(WRITER)) == first
    assert len(hub.seen("POST", "/commit/")) == 1


def test_the_published_adapter_is_loaded_back_with_the_same_logits(
    hub: HubServer, published_run: Runs, tokens: Tokens, evaluated: EvaluationRun, tmp_path: Path
) -> None:
    import torch
    from huggingface_hub import snapshot_download
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    publish(published_run(repo="acme/weather"), tokens(WRITER))
    back = snapshot_download("acme/weather", token=WRITER)

    def logits(adapter: str | Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(evaluated.manifest.model.directory, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(adapter)("How is: sun?", return_tensors="pt").input_ids
        with torch.inference_mode():
            found: torch.Tensor = PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=ids).logits
        return found

    assert torch.equal(logits(back), logits(evaluated.path / "export"))


def test_weights_of_an_earlier_kind_do_not_stay_beside_the_new_ones(
    hub: HubServer, published_run: Runs, tokens: Tokens
) -> None:
    old = {"model.safetensors": b"old", "config.json": "{}", "notes.txt": "mine", "extra/model.safetensors": b"kept"}
    hub.add_repo("acme/weather", old, private=True)
    publish(published_run(repo="acme/weather"), tokens(WRITER))
    files = hub.repo("acme/weather").files
    assert "model.safetensors" not in files
    assert "config.json" not in files
    assert files["notes.txt"] == b"mine"
    assert files["extra/model.safetensors"] == b"kept"


def test_a_name_without_an_owner_is_one_of_the_tokens_account(
    hub: HubServer, published_run: Runs, tokens: Tokens
) -> None:
    publish(published_run(repo="weather"), tokens(WRITER))
    assert hub.repo("bob/weather").private


# -- what is refused --------------------------------------------------------------------------------------------


def test_a_changed_export_is_not_published(hub: HubServer, published_run: Runs, tokens: Tokens) -> None:
    run = published_run(repo="acme/weather")
    weights = run.path / "export/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refusal(stage.run, run.context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert not hub.requests


def test_a_link_in_the_export_never_publishes_the_token_it_leads_to(
    hub: HubServer, published_run: Runs, tokens: Tokens
) -> None:
    run, place = published_run(repo="acme/weather"), tokens(WRITER)
    (run.path / "export/assets").mkdir()
    (run.path / "export/assets/digest.json").symlink_to(place / "publish")
    refused = refusal(stage.run, run.context(Stage.PUBLISH, tokens=place))
    assert "assets/digest.json is a link" in refused.sentence
    assert not hub.seen("POST", "/commit/")


def test_another_complete_export_than_the_evaluated_one_is_not_published(
    hub: HubServer, published_run: Runs, tokens: Tokens
) -> None:
    run = published_run(repo="acme/weather")
    results = json.loads((run.path / "evaluation/results.json").read_text())
    write_json(run.path / "evaluation/results.json", results | {"exportDigest": "0" * 64})
    error = refusal(stage.run, run.context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert error.failure_class is FailureClass.BAD_DATA
    assert "differs from what was evaluated (000000000000…)" in error.sentence
    assert not hub.requests


@pytest.mark.parametrize(
    ("product", "place"),
    [("prepared", "prepared/manifest.json"), ("export", "export"), ("results", "evaluation/results.json")],
)
def test_what_is_not_what_an_earlier_stage_reported_is_not_published(
    hub: HubServer, published_run: Runs, tokens: Tokens, product: str, place: str
) -> None:
    run = published_run(repo="acme/weather")
    reported = {
        "prepared": sha256_of(run.path / "prepared/manifest.json"),
        "export": digest_of(run),
        "results": sha256_of(run.path / "evaluation/results.json"),
    }
    forged = reported | {product: "0" * 64}
    error = refusal(stage.run, run.context(Stage.PUBLISH, tokens=tokens(WRITER), **forged))
    assert error.failure_class is FailureClass.BAD_DATA
    assert error.sentence.startswith(f"{place} (digest {reported[product][:12]}…) differs from what ")
    assert not hub.requests
    stage.run(run.context(Stage.PUBLISH, tokens=tokens(WRITER), **reported))
    assert run.report(Stage.EVALUATE).digests.results == reported["results"]


def test_the_card_takes_versions_only_from_the_report_of_the_published_results(
    hub: HubServer, published_run: Runs, tokens: Tokens
) -> None:
    run = published_run(repo="acme/weather")
    report = run.report(Stage.EVALUATE).to_wire()
    forged = report | {"results": report["results"] | {"exportDigest": "0" * 64}}
    write_json(run.path / "reports/evaluate-99.json", forged | {"origin": {"versions": {"finetune-operator": "6.6.6"}}})
    publish(run, tokens(WRITER))
    assert b"6.6.6" not in hub.repo("acme/weather").files["README.md"]


def test_the_gate_is_judged_anew_from_the_measured_values(hub: HubServer, published_run: Runs, tokens: Tokens) -> None:
    run = published_run(repo="acme/weather")
    results = json.loads((run.path / "evaluation/results.json").read_text())
    for metric in results["metrics"]:
        metric["difference"] = {"value": -0.1, "low": -0.2, "high": -0.05}
    assert results["gate"]["passed"]
    write_json(run.path / "evaluation/results.json", results)
    error = refusal(stage.run, run.context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert error.failure_class is FailureClass.GATE_REFUSED
    assert error.sentence.startswith("Worse than the base model: classification accuracy dropped by 10.0 points")
    assert not hub.requests


def test_without_an_evaluation_nothing_is_published(published_run: Runs) -> None:
    run = published_run(path="out")
    (run.path / "evaluation/results.json").unlink()
    error = refusal(stage.run, run.context(Stage.PUBLISH))
    assert error.failure_class is FailureClass.BAD_DATA
    assert "run the Evaluate stage again" in error.sentence


@pytest.mark.parametrize("token", [None, "hf_wrong0001", "hf_reader0001", "hf_stranger01"])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("step", [stage.check, stage.run])
def test_who_may_not_write_is_told_before_and_after_the_training(
    hub: HubServer,
    published_run: Runs,
    tokens: Tokens,
    token: str | None,
    exists: bool,
    step: Callable[[RunContext], None],
) -> None:
    hub.add_token("hf_stranger01", user="eve", write=True)
    if exists:
        hub.add_repo("acme/weather", {"a.txt": "a"}, private=False)
    run = published_run(repo="acme/weather", private=not exists)
    error = refusal(step, run.context(Stage.PUBLISH, tokens=tokens(token) if token else None))
    assert error.failure_class is FailureClass.NO_ACCESS
    assert "/settings/tokens" in error.sentence or f"{hub.url}/acme" in error.sentence
    assert token is None or token not in error.sentence
    assert not hub.seen("POST", "/commit/")


@pytest.mark.parametrize("step", [stage.check, stage.run])
def test_a_public_repository_is_refused_where_it_has_to_be_private(
    hub: HubServer, published_run: Runs, tokens: Tokens, step: Callable[[RunContext], None]
) -> None:
    hub.add_repo("acme/weather", {"a.txt": "a"}, private=False)
    error = refusal(step, published_run(repo="acme/weather").context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert error.failure_class is FailureClass.BAD_SPEC
    assert error.field == "publish.private"
    assert f"{hub.url}/acme/weather/settings" in error.sentence


def test_a_check_that_passes_makes_nothing(hub: HubServer, published_run: Runs, tokens: Tokens) -> None:
    run = published_run(repo="acme/weather")
    stage.check(run.context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert ("models", "acme/weather") not in hub.repos
    hub.add_repo("acme/weather", {}, private=True)
    stage.check(run.context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert {request.method for request in hub.requests} == {"GET"}
    assert not (run.path / "reports/publish-1.json").exists()


def test_a_disabled_repository_is_named(hub: HubServer, published_run: Runs, tokens: Tokens) -> None:
    hub.add_repo("acme/weather", {}, private=True, disabled=True)
    error = refusal(stage.check, published_run(repo="acme/weather").context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert error.failure_class is FailureClass.NO_ACCESS
    assert "was disabled" in error.sentence


# -- what the network does --------------------------------------------------------------------------------------

CALLS = {
    "info": ("GET", r"/api/models/acme/weather$"),
    "creation": ("POST", "/api/repos/create"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "file": ("PUT", "/lfs-put/"),
    "verify": ("POST", "/info/lfs/verify"),
    "commit": ("POST", "/commit/"),
    "check of the upload": ("GET", "/tree/"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", ["429", "503", "504", "cut", "504 after", "cut after"])
def test_a_passing_fault_of_any_call_is_survived_with_one_commit(
    hub: HubServer, published_run: Runs, tokens: Tokens, call: str, fault: str
) -> None:
    how = {"cut": True} if fault.startswith("cut") else {"status": int(fault[:3])}
    injected = hub.fault(*CALLS[call], **how, after=fault.endswith("after"), headers={"Retry-After": "1"})
    published = publish(published_run(repo="acme/weather"), tokens(WRITER))
    repo = hub.repo("acme/weather")
    assert injected.hits == 1
    assert published.commit == repo.head.id
    assert len(repo.commits) == 2  # the one that made the repository, and ours


def test_the_pause_is_what_the_hub_asks_for(
    hub: HubServer, published_run: Runs, tokens: Tokens, no_pauses: list[float]
) -> None:
    hub.fault("POST", "/commit/", status=429, headers={"Retry-After": "17"}, times=2)
    publish(published_run(repo="acme/weather"), tokens(WRITER))
    assert no_pauses == [17, 17]


def test_a_hub_that_stays_away_is_said_to_be_unavailable_and_a_later_attempt_succeeds(
    hub: HubServer, published_run: Runs, tokens: Tokens
) -> None:
    run = published_run(repo="acme/weather")
    away = hub.fault("POST", "/commit/", status=503, times=None)
    error = refusal(stage.run, run.context(Stage.PUBLISH, tokens=tokens(WRITER)))
    assert error.failure_class is FailureClass.HUB_UNAVAILABLE
    assert "status 503 after 5 tries" in error.sentence
    assert "The model is kept" in error.sentence
    away.times = 0
    assert publish(run, tokens(WRITER)).commit == hub.repo("acme/weather").head.id


def test_rights_that_end_in_the_middle_are_no_access(hub: HubServer, published_run: Runs, tokens: Tokens) -> None:
    for status in (401, 403):
        run = published_run(repo="acme/weather")
        hub.fault("POST", "/commit/", status=status)
        error = refusal(stage.run, run.context(Stage.PUBLISH, tokens=tokens(WRITER)))
        assert error.failure_class is FailureClass.NO_ACCESS


# -- directories ------------------------------------------------------------------------------------------------


def test_a_directory_holds_the_files_and_the_card_and_doing_it_again_changes_nothing(published_run: Runs) -> None:
    run = published_run(path="out/weather")
    published = publish(run, None)
    place = Path(str(published.path))
    assert place == Path(run.config.paths.source) / "out/weather"
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in place.iterdir()}
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "digest.json"} <= before.keys()
    assert publish(run, None) == published
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in place.iterdir()} == before


@pytest.mark.parametrize("step", [stage.check, stage.run])
def test_a_directory_with_something_else_is_refused(published_run: Runs, step: Callable[[RunContext], None]) -> None:
    run = published_run(path="out")
    other = Path(run.config.paths.source) / "out" / "thesis.txt"
    other.parent.mkdir()
    other.write_text("do not lose")
    error = refusal(step, run.context(Stage.PUBLISH))
    assert error.failure_class is FailureClass.BAD_SPEC
    assert error.field == "publish.path"
    assert "which are not overwritten" in error.sentence
    assert [p.name for p in other.parent.iterdir()] == ["thesis.txt"]


def test_a_directory_half_written_by_a_killed_attempt_is_not_in_the_way(published_run: Runs) -> None:
    run = published_run(path="out")
    left = Path(run.config.paths.source) / ".out.publishing"
    left.mkdir()
    (left / "junk").write_text("half")
    place = Path(str(publish(run, None).path))
    assert not left.exists()
    assert not (place / "junk").exists()


def test_publish_and_the_check_of_write_access_start_without_torch() -> None:
    program = "import sys, finetune_trainer.publish.stage; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
