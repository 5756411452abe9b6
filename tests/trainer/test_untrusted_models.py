"""A model from strangers names no file but its own, whatever its tokenizer, index or config says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny import tiny_llama

from finetune_api.report import FailureClass
from finetune_api.spec import Model
from finetune_trainer.failures import TrainerError
from finetune_trainer.model.weights import SafetensorsDirectory
from finetune_trainer.prepare.fetched import Fetched
from finetune_trainer.prepare.models import count_parameters, describe, load_config, locate_model
from finetune_trainer.untrusted import check_model_files

SECRET = "hf_READTOKENOFTHEVICTIM42"


NOTHING_FETCHED = Fetched(attempt="u/prepare/1", config_digest="c")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secrets/hub"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16)


def with_keys(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


def refused(directory: Path) -> str:
    def resolve(given: str, field: str) -> Path:
        return Path(given)

    with pytest.raises(TrainerError) as error:
        locate_model(Model(path=str(directory)), NOTHING_FETCHED, resolve, directory.parent / "cache")
    assert error.value.failure_class is FailureClass.BAD_SPEC
    assert SECRET not in error.value.sentence
    return error.value.sentence


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
@pytest.mark.parametrize("key", ["vocab", "merges", "vocab_file", "spm_file", "anything"])
def test_a_tokenizer_that_names_a_file_elsewhere_is_refused(model: Path, secret: Path, name: str, key: str) -> None:
    with_keys(model / name, lambda content: content.update({key: str(secret)}))
    assert f"{name} names a file outside the model ({key}: " in refused(model)


@pytest.mark.parametrize("key", ["vocab", "merges", "other"])
def test_neither_may_the_model_in_tokenizer_json(model: Path, secret: Path, key: str) -> None:
    with_keys(model / "tokenizer.json", lambda content: content["model"].update({key: str(secret)}))
    assert "tokenizer.json names a file outside the model" in refused(model)


def test_nor_a_way_up_or_a_file_of_the_working_directory(
    model: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_keys(model / "tokenizer_config.json", lambda content: content.update(vocab_file="../secrets/hub"))
    assert "vocab_file: '../secrets/hub'" in refused(model)
    with_keys(model / "tokenizer_config.json", lambda content: content.update(vocab_file="hub"))
    monkeypatch.chdir(secret.parent)
    assert "vocab_file: 'hub'" in refused(model)


def test_paths_of_another_machine_and_names_of_own_files_are_no_reason(model: Path) -> None:
    stale = {
        "tokenizer_file": "/content/checkpoints/tokenizer.json",
        "special_tokens_map_file": "/opt/cache/huggingface/special_tokens_map.json",
        "vocab_file": "tokenizer.json",
        "name_or_path": str(model),
        "unk_token": "/",
        "merges_file": None,
    }
    with_keys(model / "tokenizer_config.json", lambda content: content.update(stale))
    check_model_files(model)


@pytest.mark.parametrize(
    "file", ["../victim/private.safetensors", "/srv/private.safetensors", "a/b.safetensors", "w.bin", "..", 5, None]
)
def test_an_index_that_names_weights_elsewhere_is_refused_by_prepare_and_by_the_reader(model: Path, file: Any) -> None:
    with_keys(model / "model.safetensors.index.json", lambda content: content.update(weight_map={"a": file}))
    assert "no safetensors file beside it" in refused(model)
    with pytest.raises(TrainerError, match="no safetensors file beside it"):
        SafetensorsDirectory(model)


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "model.safetensors.index.json"])
def test_a_damaged_file_is_named(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    assert f"{name} is not" in refused(model)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.sampled_from(["/etc/passwd", "../x", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(content=st.dictionaries(st.sampled_from(["vocab", "model", "vocab_file", "x"]), JSON))
def test_whatever_a_tokenizer_says_is_taken_or_refused_in_a_sentence(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("model")
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    with contextlib.suppress(TrainerError):
        check_model_files(directory)
        assert not isinstance(content.get("vocab"), str)
        assert "/etc/passwd" not in content.values()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b"\xff",
        b'{"w": {"shape": ["a"]}}',
        b'{"w": {"shape": [-1]}}',
        b'{"w": {"shape": [99999999999999]}}',
        b'{"w": 1}',
        None,
    ],
)
def test_a_header_of_weights_that_is_none_is_refused(tmp_path: Path, header: bytes | None) -> None:
    length = 1 << 40 if header is None else len(header)
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + (header or b""))
    with pytest.raises(TrainerError, match=r"The model cannot be used: .*model\.safetensors") as error:
        count_parameters(tmp_path, tied=False)
    assert error.value.failure_class is FailureClass.BAD_SPEC


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_dim", -1),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**30),
        ("intermediate_size", "many"),
        ("num_key_value_heads", [1]),
    ],
)
def test_an_absurd_shape_is_refused_with_a_sentence(model: Path, field: str, value: object) -> None:
    with_keys(model / "config.json", lambda config: config.update({field: value}))
    with pytest.raises(TrainerError, match=r"The model's config cannot be (used|read)") as error:
        describe(load_config(model), model)
    assert error.value.failure_class is FailureClass.BAD_SPEC
    assert field in error.value.sentence or field == "num_attention_heads"
