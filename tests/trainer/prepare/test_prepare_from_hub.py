"""Model and datasets from a Hub: the commit is pinned, access is asked for, every refusal is a sentence."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.hub_job import ROWS, SPEC, tiny_model
from tests.support.hub_server import HubServer, hub_in_this_process
from tests.support.prepare_runs import labelled, prepare, prepare_context

from finetune_api.report import FailureClass
from finetune_trainer.data.evaluation_rows import read_evaluation
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.failures import TrainerError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server, hub_in_this_process(server, tmp_path / "home"):
        server.add_token("hf_alice_reads", user="alice")
        yield server


def parquet(table: Mapping[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(table)), buffer)
    return buffer.getvalue()


def refused(work: Path, spec: Mapping[str, Any], token: str | None = None) -> TrainerError:
    with pytest.raises(TrainerError) as error:
        prepare(prepare_context(work, spec, token=token))
    return error.value


def test_the_three_reference_datasets_work_by_their_names_alone(hub: HubServer, model: Path, tmp_path: Path) -> None:
    words = [row["text"] for row in labelled(60)]
    hub.add_repo("meta/tiny", model)
    hub.add_repo(
        "infinite-dataset-hub/TextClaimsDataset",
        {
            "data.csv": "idx,text,label\n"
            + "".join(f'{i},"{w}",{"Claim" if i % 2 else "Not a Claim"}\n' for i, w in enumerate(words))
        },
        kind="datasets",
    )
    readme = (
        "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - name: label\n    dtype:\n"
        "      class_label:\n        names: {'0': activate_my_card, '1': age_limit, '2': card_arrival}\n---\n"
    )
    labels = [i % 3 for i in range(60)]
    hub.add_repo(
        "PolyAI/banking77",
        {
            "README.md": readme,
            "data/train-00000-of-00001.parquet": parquet({"text": words, "label": labels}),
            "data/test-00000-of-00001.parquet": parquet(
                {"text": [f"test {w}" for w in words[:9]], "label": labels[:9]}
            ),
        },
        kind="datasets",
    )
    questions = {
        "question": [f"Which of these is number {i}, asked on day {i * 31}?" for i in range(30)],
        "choices": [{"label": list("ABCDE"), "text": [f"{i} {c}" for c in "vwxyz"]} for i in range(30)],
        "answerKey": ["ABCDE"[i % 5] for i in range(30)],
    }
    hub.add_repo(
        "tau/commonsense_qa",
        {
            "data/train-00000-of-00001.parquet": parquet(questions),
            "data/validation-00000-of-00001.parquet": parquet(
                questions | {"question": [f"v {q}" for q in questions["question"]]}
            ),
            "data/test-00000-of-00001.parquet": parquet(questions | {"answerKey": [""] * 30}),
        },
        kind="datasets",
    )
    names = {
        "claims": "infinite-dataset-hub/TextClaimsDataset",
        "banking77": "PolyAI/banking77",
        "commonsense": "tau/commonsense_qa",
    }
    spec = {"model": {"repo": "meta/tiny"}, "datasets": [{"name": n, "repo": repo} for n, repo in names.items()]}
    context = prepare_context(tmp_path, spec)
    prepare(context)
    manifest = PreparedManifest.read(context.prepared)
    assert manifest.dataset("claims").labels == ["Claim", "Not a Claim"]
    assert manifest.dataset("banking77").labels == ["activate_my_card", "age_limit", "card_arrival"]
    assert (manifest.dataset("banking77").test, manifest.dataset("commonsense").test) == (9, 30)
    assert manifest.evaluation_split == ("unseen half of validation (claims), test (banking77), test (commonsense)")
    row = next(iter(read_evaluation(context.prepared / "evaluation" / "commonsense.jsonl")))
    assert row.candidates == ["0 v", "0 w", "0 x", "0 y", "0 z"]


def test_everything_is_pinned_to_the_commit_that_the_revision_was(hub: HubServer, model: Path, tmp_path: Path) -> None:
    base = hub.add_repo("meta/tiny", model)
    rows = hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets")
    first, pinned = base.head.id, rows.head.id
    context = prepare_context(tmp_path, SPEC)
    prepare(context)
    hub.push(base, {"README.md": "moved on"})
    hub.push(rows, {"train.csv": "text,label\nother,x\n"})
    manifest = PreparedManifest.read(context.prepared)
    assert (manifest.model.commit, manifest.datasets[0].source) == (first, f"acme/rows@{pinned}")
    assert context.reporter.report.origin["model"] == f"meta/tiny@{first}"
    before = len(hub.requests)
    prepare(prepare_context(tmp_path, SPEC, number=2))
    assert len(hub.requests) == before, "what is prepared asks nothing of the Hub"
    old = {"datasets": [SPEC["datasets"][0] | {"revision": pinned}]}
    again = prepare_context(
        tmp_path / "again", SPEC | old | {"model": {"repo": "meta/tiny", "revision": first}}, cache=tmp_path / "cache"
    )
    prepare(again)
    assert PreparedManifest.read(again.prepared).model.directory == manifest.model.directory
    assert not [r for r in hub.requests[before:] if r.method == "GET" and "/resolve/" in r.path], "downloaded twice"


def test_only_what_is_needed_is_downloaded(hub: HubServer, model: Path, tmp_path: Path) -> None:
    base = hub.add_repo("meta/tiny", model)
    hub.push(base, {"pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle", "evil.py": "boom"})
    hub.add_repo("acme/rows", {"train.csv": ROWS, "test.csv": ROWS, "picture.png": b"x"}, kind="datasets")
    prepare(prepare_context(tmp_path, SPEC))
    fetched = " ".join(request.path for request in hub.seen("GET", "/resolve/"))
    assert "model.safetensors" in fetched
    assert not [name for name in (".bin", ".pth", ".py", ".png") if name in fetched]


def test_the_download_tells_its_bytes(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("meta/tiny", model)
    hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets")
    context = prepare_context(tmp_path, SPEC)
    seen: list[Any] = []
    monkeypatch.setattr(context.reporter, "progress", seen.append)
    prepare(context)
    of_model = [p for p in seen if p.unit == "bytes" and p.total > (model / "model.safetensors").stat().st_size]
    assert of_model[-1].step == of_model[-1].total


def test_a_dataset_with_a_loading_script_is_read_from_the_hub_s_conversion(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    hub.add_repo("meta/tiny", model)
    repo = hub.add_repo("acme/rows", {"rows.py": "raise SystemExit"}, kind="datasets")
    rows = labelled(40)
    table = parquet({name: [row[name] for row in rows] for name in ("text", "label")})
    converted = hub.push(repo, {"default/train/0000.parquet": table})
    repo.refs["refs/convert/parquet"] = converted.id
    context = prepare_context(tmp_path, SPEC)
    prepare(context)
    assert "read from the Hub's Parquet files (refs/convert/parquet)" in context.reporter.report.datasets[0].notes[0]


@pytest.mark.parametrize(
    ("settings", "token", "sentence"),
    [
        (
            {"gated": True},
            None,
            "The model meta/tiny is gated and no token was given: accept its terms at {url}/meta/tiny",
        ),
        ({"gated": True}, "hf_alice_reads", "The model meta/tiny is gated: accept its terms at {url}/meta/tiny"),
        (
            {"gated": True, "consented": ("alice",)},
            "hf_of_nobody",
            "The Hub rejected the token for meta/tiny",
        ),
        ({"private": True}, None, "There is no model meta/tiny on the Hub, or it is private"),
        ({"private": True}, "hf_alice_reads", "There is no model meta/tiny on the Hub, or the token's account has no"),
        ({"disabled": True}, "hf_alice_reads", "The model meta/tiny was disabled on the Hub: see {url}/meta/tiny"),
    ],
)
def test_a_model_that_may_not_be_read_is_refused_with_what_to_do(
    hub: HubServer, model: Path, tmp_path: Path, settings: dict[str, Any], token: str | None, sentence: str
) -> None:
    hub.add_repo("meta/tiny", model, **settings)
    error = refused(tmp_path, SPEC, token)
    assert (error.failure_class, error.field) == (FailureClass.NO_ACCESS, "model.repo")
    assert sentence.format(url=hub.url) in error.sentence
    assert token is None or token not in error.sentence


def test_consent_given_opens_a_gated_model(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add_repo("meta/tiny", model, gated=True, consented=("alice",))
    hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets")
    prepare(prepare_context(tmp_path, SPEC, token="hf_alice_reads"))


def test_a_gated_dataset_names_its_own_page_and_field(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add_repo("meta/tiny", model)
    hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets", gated=True)
    error = refused(tmp_path, SPEC, "hf_alice_reads")
    assert error.field == "datasets[0].repo"
    assert f"{hub.url}/datasets/acme/rows" in error.sentence


def test_a_name_a_revision_or_a_configuration_that_is_not_there_is_refused(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    error = refused(tmp_path, SPEC)
    assert error.failure_class is FailureClass.NO_ACCESS
    hub.add_repo("meta/tiny", model)
    error = refused(tmp_path, SPEC | {"model": {"repo": "meta/tiny", "revision": "v9"}})
    assert (error.failure_class, error.field) == (FailureClass.BAD_SPEC, "model.revision")
    assert "has no revision 'v9'" in error.sentence
    hub.add_repo("acme/rows", {"a/train.csv": ROWS, "b/train.csv": ROWS}, kind="datasets")
    error = refused(tmp_path, SPEC | {"datasets": [SPEC["datasets"][0] | {"config": "c"}]})
    assert (error.field, error.sentence) == (
        "datasets[0].config",
        "The dataset has no configuration 'c'. Available: a, b.",
    )


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    "where", ["auth-check", "/api/datasets/acme/rows/revision", "/api/models/meta/tiny/tree", "resolve"]
)
def test_a_hub_that_does_not_answer_is_tried_again_later(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, where: str
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.add_repo("meta/tiny", model)
    hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets")
    hub.fault("*", where, status=status, times=None)
    error = refused(tmp_path, SPEC)
    assert error.failure_class is FailureClass.HUB_UNAVAILABLE
    assert f"status {status}" in error.sentence


def test_a_connection_that_is_cut_once_is_picked_up_again(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add_repo("meta/tiny", model)
    hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets")
    cut = hub.fault("GET", r"/resolve/.*/model\.safetensors", cut=True, status=200)
    context = prepare_context(tmp_path, SPEC)
    prepare(context)
    assert cut.hits == 1
    directory = Path(PreparedManifest.read(context.prepared).model.directory)
    assert (directory / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_hub_that_is_not_there_is_tried_again_later(hub: HubServer, tmp_path: Path) -> None:
    hub.stop()
    assert refused(tmp_path, SPEC).failure_class is FailureClass.HUB_UNAVAILABLE


def test_a_model_without_safetensors_is_refused_before_anything_is_downloaded(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    hub.add_repo("meta/tiny", {"config.json": json.dumps(config), "pytorch_model.bin": b"pickle"})
    hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets")
    assert "pickle files, which can run code" in refused(tmp_path, SPEC).sentence
    assert not hub.seen("GET", r"/resolve/.*\.bin")


def test_the_token_is_in_no_report_and_no_prepared_file(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add_repo("meta/tiny", model, private=False, gated=True, consented=("alice",))
    hub.add_repo("acme/rows", {"train.csv": ROWS}, kind="datasets")
    prepare(prepare_context(tmp_path, SPEC, token="hf_alice_reads"))
    written = [path for place in ("run", "cache") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"hf_alice_reads" in path.read_bytes()]
