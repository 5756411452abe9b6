"""The loopback Hub against the real clients: what the other tests rest on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tests.support.hub_server import HubServer, hub_in_this_process
from tests.support.tiny import tiny_llama


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(multipart_bytes=100_000) as server, hub_in_this_process(server, tmp_path / "home"):
        server.add_token("hf_reader", user="alice")
        server.add_token("hf_writer", user="bob", write=True, orgs=("acme",))
        yield server


def api(token: str | None = None) -> HfApi:
    return HfApi(token=token or False)


def test_a_model_is_downloaded_and_loaded(hub: HubServer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub.add_repo("acme/tiny", tiny_llama(tmp_path / "tiny"))
    directory = Path(api().snapshot_download("acme/tiny"))
    assert (directory / "model.safetensors").read_bytes() == (tmp_path / "tiny/model.safetensors").read_bytes()
    assert AutoModelForCausalLM.from_pretrained("acme/tiny").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained("acme/tiny").pad_token == "<|pad|>"


def test_datasets_of_csv_and_parquet_load_by_name_and_by_commit(hub: HubServer, tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x"] * 7}), tmp_path / "rows.parquet")
    csv = hub.add_repo(
        "acme/rows", {"train.csv": "text,label\na,0\nb,1\n", "test.csv": "text,label\nc,0\n"}, kind="datasets"
    )
    hub.add_repo(
        "acme/parquet", {"data/train-00000.parquet": (tmp_path / "rows.parquet").read_bytes()}, kind="datasets"
    )
    with hub_in_this_process(hub, tmp_path / "home2"):
        loaded = datasets.load_dataset("acme/rows", revision=csv.head.id)
        assert {name: len(split) for name, split in loaded.items()} == {"train": 2, "test": 1}
        assert len(datasets.load_dataset("acme/parquet")["train"]) == 7


def test_rights_are_told_apart(hub: HubServer) -> None:
    hub.add_repo("acme/secret", {"a.txt": "a"}, private=True)
    hub.add_repo("meta/gated", {"config.json": "{}"}, gated=True)
    hub.add_repo("acme/off", {"a.txt": "a"}, disabled=True)
    with pytest.raises(RepositoryNotFoundError):
        api("hf_reader").model_info("acme/secret")
    assert api("hf_writer").model_info("acme/secret").private
    for token in (None, "hf_reader"):
        with pytest.raises(GatedRepoError):
            api(token).hf_hub_download("meta/gated", "config.json")
    hub.repo("meta/gated").consented.add("alice")
    assert Path(api("hf_reader").hf_hub_download("meta/gated", "config.json")).read_text() == "{}"
    with pytest.raises(DisabledRepoError):
        api().model_info("acme/off")
    with pytest.raises(HfHubHTTPError) as wrong:
        api("hf_wrong").auth_check("acme/secret")
    assert wrong.value.response.status_code == 401
    assert not isinstance(wrong.value, RepositoryNotFoundError)
    api("hf_writer").auth_check("acme/secret", write=True)


def test_what_is_missing_is_named(hub: HubServer) -> None:
    hub.add_repo("acme/open", {"a.txt": "a", "deep/b.txt": "b"})
    with pytest.raises(RevisionNotFoundError):
        api().hf_hub_download("acme/open", "a.txt", revision="feature/none")
    with pytest.raises(RemoteEntryNotFoundError):
        api().hf_hub_download("acme/open", "b.txt")
    assert [entry.path for entry in api().list_repo_tree("acme/open")] == ["deep", "a.txt"]


def test_a_folder_goes_up_in_one_commit_in_parts_and_a_second_time_not_at_all(hub: HubServer, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    client = api("hf_writer")
    client.create_repo("acme/new", private=True)
    first = client.upload_folder(repo_id="acme/new", folder_path=folder)
    assert hub.repo("acme/new").private
    assert hub.repo("acme/new").files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.seen("PUT", "/lfs-put/.*/[0-9]+$")) > 1
    assert client.upload_folder(repo_id="acme/new", folder_path=folder).oid == first.oid == hub.repo("acme/new").head.id
    assert len(hub.seen("POST", "/commit/")) == 1
    client.create_tag("acme/new", tag="v/1")
    assert client.model_info("acme/new", revision="v/1").sha == first.oid


def test_faults_are_injected_as_ordered(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    hub.add_repo("acme/open", {"a.txt": "a" * 100})
    limited = hub.fault("GET", "/tree/", status=429, headers={"Retry-After": "0"}, times=2)
    assert list(api().list_repo_tree("acme/open"))
    assert limited.hits == 2
    hub.fault("GET", "/resolve/", cut=True)
    assert Path(api().hf_hub_download("acme/open", "a.txt")).read_text() == "a" * 100
    hub.fault("POST", "/commit/", status=504, after=True)
    with pytest.raises(HfHubHTTPError, match="504"):
        api("hf_writer").upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="acme/open")
    assert hub.repo("acme/open").files["b.txt"] == b"b"
