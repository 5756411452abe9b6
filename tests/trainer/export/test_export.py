"""What is exported is what was trained, as a user would load it; and nobody can alter it unnoticed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.support.architectures import tiny_architecture
from tests.support.batches import examples, packed, padded
from tests.support.loading import load, tuning
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.report import FailureClass
from finetune_api.spec import Quantization, Tuning
from finetune_trainer import export
from finetune_trainer.digest import export_digest
from finetune_trainer.export import Base, Exported, export_model
from finetune_trainer.failures import TrainerError, classify
from finetune_trainer.model import writer
from finetune_trainer.model.build import CausalModel
from finetune_trainer.model.nf4 import keep_unpacked, linear_4bit, write_nf4_copy

LENGTHS = (5, 17, 9, 3)

METHODS: dict[str, Tuning] = {
    "full": tuning("full"),
    "lora": tuning("lora"),
    "rslora": tuning("lora", rslora=True, layers="1"),
    "dora": tuning("lora", dora=True),
    "pissa": tuning("lora", init="pissa", rank=4),
    "pissa with rslora": tuning("lora", init="pissa", rank=4, rslora=True, targetModules="q_proj"),
    "head and embeddings": tuning("lora", targetModules="q_proj,embed_tokens,lm_head", rank=3),
    "saved head": tuning("lora", modulesToSave=["lm_head"]),
    "saved embeddings": tuning("lora", modulesToSave=["embed_tokens"]),
    "qlora": tuning("qlora"),
    "prompt": tuning("prompt"),
    "prefix": tuning("prefix"),
}
UNMERGED = ("prompt", "prefix")


def trained(directory: Path, how: Tuning, **changes: Any) -> tuple[CausalModel, NDArray[Any]]:
    """A model after three steps that change much, and its losses."""
    if how.method == "qlora":
        changes["nf4_directory"] = directory / "nf4"
    model = load(directory, how, **changes)
    batch = (packed if model.packs else padded)(examples(LENGTHS))
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trainable], lr=2e-2, eps=1e-3)
    for _ in range(3):
        (model(batch).sum() / (dist.get_world_size() if dist.is_initialized() else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model, model.eval()(batch).numpy()


def write(model: CausalModel, directory: Path, out: Path, format: str = "adapter", **changes: Any) -> Exported:
    fixed = {"end_token_ids": [2, 0], "pad_token_id": 3, "tokenizer": directory / "tokenizer"}
    base = Base(directory, "acme/base", "0123abcd")
    return export_model(model, directory=out, base=base, format=format, **(fixed | changes))  # type: ignore[arg-type]


def train_and_write(directory: Path, method: str, format: str, out: Path) -> tuple[NDArray[Any], Exported]:
    model, losses = trained(directory, METHODS[method])
    exported = write(model, directory, out, format)
    assert (out / "digest.json").exists()  # on every rank: it is durable when the call returns
    if dist.is_initialized():
        dist.barrier()
    return losses, exported


def as_a_user(directory: Path, out: Path, exported: Exported, four_bits: bool = False) -> NDArray[Any]:
    """The losses of the documents, each alone, with the export loaded by its users' libraries."""
    if exported.format == "adapter":
        base = AutoModelForCausalLM.from_pretrained(directory / "nf4" if four_bits else directory, dtype=torch.float32)
        keep_unpacked(base)
        for layer in linear_4bit(base).values():
            layer.compute_dtype = torch.float32
        model = PeftModel.from_pretrained(base, out)
    else:
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    found = []
    for document in examples(LENGTHS):
        tokens = document.tokens
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        logits = logits[0, -tokens.shape[1] :][:-1].log_softmax(-1)
        found.append(-logits.gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(found).numpy()


@pytest.fixture(scope="module", params=["tied", "untied"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_llama(tmp_path_factory.mktemp("model"), tied=request.param == "tied")
    tiny_tokenizer(path / "tokenizer")
    write_nf4_copy(path, path / "nf4", Quantization())
    return path


@pytest.mark.parametrize("method", list(METHODS))
def test_an_adapter_computes_what_was_trained(tmp_path: Path, directory: Path, method: str) -> None:
    out = tmp_path / "export"
    losses, exported = train_and_write(directory, method, "adapter", out)
    assert exported.format == ("model" if method == "full" else "adapter")
    loaded = as_a_user(directory, out, exported, four_bits=method == "qlora")
    np.testing.assert_allclose(loaded, losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*UNMERGED, "full", "qlora")])
def test_merged_weights_compute_what_the_adapter_computes(tmp_path: Path, directory: Path, method: str) -> None:
    out = tmp_path / "export"
    losses, exported = train_and_write(directory, method, "merged", out)
    assert exported.format == "merged"
    np.testing.assert_allclose(as_a_user(directory, out, exported), losses, rtol=1e-5, atol=1e-5)


def test_qlora_is_merged_into_the_weights_before_quantisation(tmp_path: Path, directory: Path) -> None:
    model, _ = trained(directory, METHODS["qlora"])
    write(model, directory, tmp_path / "merged", "merged")
    write(model, directory, tmp_path / "adapter")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in expected.merge_and_unload().state_dict().items():
        if name in found:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "format"), [("full", "adapter"), ("lora", "adapter"), ("pissa", "adapter")])
def test_ranks_export_together_what_one_would(tmp_path: Path, directory: Path, method: str, format: str) -> None:
    out = tmp_path / "export"
    (losses, exported), other = run_ranks(2, train_and_write, directory, method, format, out)
    assert other[1] == exported
    assert export_digest(out) == exported.digest
    np.testing.assert_allclose(as_a_user(directory, out, exported), losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "qlora", "head and embeddings"])
def test_ranks_merge_together_what_one_would(tmp_path: Path, directory: Path, method: str) -> None:
    train_and_write(directory, method, "merged", tmp_path / "one")
    run_ranks(2, train_and_write, directory, method, "merged", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)


def test_experts_are_exported_one_by_one_as_the_base_has_them(tmp_path: Path) -> None:
    directory = tiny_architecture(tmp_path / "model", "mixtral")
    tiny_tokenizer(directory / "tokenizer")
    model, losses = trained(directory, METHODS["full"])
    exported = write(model, directory, tmp_path / "export")
    base, found = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "export"))
    assert found.keys() == base.keys()
    np.testing.assert_allclose(as_a_user(directory, tmp_path / "export", exported), losses, rtol=1e-5, atol=1e-5)


EXPERTS = {
    "mixtral": tuning("lora", targetModules="gate_up_proj,down_proj", rank=2),
    "qwen2_moe": tuning("lora", targetModules=r".*experts\.(gate_up|down)_proj", layers="1", rank=2),
    "gpt_oss": tuning("lora", targetModules="q_proj,gate_up_proj,down_proj", rank=2),
    "granitemoe": tuning("lora", targetModules="gate_up_proj,down_proj", rank=2),
}


@pytest.mark.parametrize("architecture", list(EXPERTS))
def test_adapters_of_experts_are_exported_and_merged(tmp_path: Path, architecture: str) -> None:
    directory = tiny_architecture(tmp_path / "model", architecture)
    tiny_tokenizer(directory / "tokenizer")
    model, losses = trained(directory, EXPERTS[architecture])
    assert any("experts" in name for name, _ in model.trainable)
    for format in ("adapter", "merged"):
        exported = write(model, directory, tmp_path / format, format)
        np.testing.assert_allclose(as_a_user(directory, tmp_path / format, exported), losses, rtol=1e-5, atol=1e-5)


def test_adapters_of_experts_are_merged_under_qlora_too(tmp_path: Path) -> None:
    directory = tiny_architecture(tmp_path / "model", "mixtral")
    tiny_tokenizer(directory / "tokenizer")
    write_nf4_copy(directory, directory / "nf4", Quantization())
    model, _ = trained(directory, tuning("qlora", rank=2))
    for format in ("adapter", "merged"):
        write(model, directory, tmp_path / format, format)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("method", "format"), [("lora", "merged"), ("full", "adapter")])
def test_an_export_in_which_a_trained_value_has_no_place_is_never_written(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, method: str, format: str
) -> None:
    model, _ = trained(directory, METHODS[method])
    values = export._full_values if method == "full" else export._merged_values

    def with_another(*arguments: Any) -> dict[str, Any]:
        return {**values(*arguments), "model.layers.0.nothing.weight": lambda old: old}

    monkeypatch.setattr(export, values.__name__, with_another)
    with pytest.raises(RuntimeError, match=r"no file of the export took .*layers\.0\.nothing\.weight"):
        write(model, directory, tmp_path / "export", format)
    assert not (tmp_path / "export").exists()


def test_exported_weights_have_the_data_type_of_the_base(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer(directory / "tokenizer")
    for method, format in (("full", "adapter"), ("lora", "merged")):
        model, _ = trained(directory, METHODS[method])
        write(model, directory, tmp_path / "export", format)
        tensors = load_file(tmp_path / "export" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("method", UNMERGED)
def test_virtual_tokens_cannot_be_merged(tmp_path: Path, directory: Path, method: str) -> None:
    model, _ = trained(directory, METHODS[method])
    with pytest.raises(TrainerError, match="cannot be merged") as refusal:
        write(model, directory, tmp_path / "export", "merged")
    assert refusal.value.field == "publish.format"


# --- what comes with it ----------------------------------------------------------------------------------------------


def test_the_export_names_its_base_and_carries_tokenizer_template_and_generation_config(
    tmp_path: Path, directory: Path
) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 2}))
    out = tmp_path / "export"
    exported = write(trained(directory, METHODS["lora"])[0], directory, out)
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("acme/base", "0123abcd")
    assert adapter["inference_mode"] is True
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).startswith("<|im_start|>")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2, 0], 3)
    assert exported.size_bytes == sum(path.stat().st_size for path in out.iterdir())


def test_a_merged_export_is_a_plain_model_untied_only_if_it_must_be(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "model", tied=True)
    tiny_tokenizer(directory / "tokenizer")
    for method, tied in (("lora", True), ("saved head", False)):
        write(trained(directory, METHODS[method])[0], directory, tmp_path / method, "merged")
        assert json.loads((tmp_path / method / "config.json").read_text())["tie_word_embeddings"] is tied
        assert not (tmp_path / method / "adapter_config.json").exists()


def test_named_chat_templates_are_exported(tmp_path: Path, directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model, _ = trained(directory, METHODS["lora"])
    write(model, directory, tmp_path / "export", tokenizer=tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template["tool_use"] == "{{ tools }}"
    assert len(export_digest(tmp_path / "export")) == 64


# --- digest and durability -------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, CausalModel, Path]:
    directory = tiny_llama(tmp_path / "model")
    tiny_tokenizer(directory / "tokenizer")
    model, _ = trained(directory, METHODS["lora"])
    write(model, directory, tmp_path / "export")
    return tmp_path / "export", model, directory


def test_the_same_weights_have_the_same_digest_and_others_another(exported: tuple[Path, CausalModel, Path]) -> None:
    out, model, directory = exported
    first = export_digest(out)
    assert write(model, directory, out).digest == first == export_digest(out)
    with torch.no_grad():
        model.trainable[0][1][0, 0] += 1e-3
    assert write(model, directory, out).digest != first


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def with_link(path: Path) -> None:
    """A link that leads nowhere here, and to a token where the export is published."""
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/var/run/secrets/finetune/publish")


def with_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda out: flip(out / "adapter_model.safetensors"), r"adapter_model\.safetensors was changed"),
        (lambda out: os.truncate(out / "tokenizer.json", 10), r"tokenizer\.json was changed"),
        (lambda out: (out / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
        (lambda out: (out / "extra.bin").touch(), r"extra\.bin was added"),
        (lambda out: (out / "digest.json").unlink(), "not a complete export"),
        (lambda out: (out / "digest.json").write_text("{"), "not a complete export"),
        (lambda out: (out / "digest.json").write_text("[]"), "not a complete export"),
        (lambda out: (out / "digest.json").write_text('{"files": 1}'), "not a complete export"),
        (lambda out: with_link(out / "notes.txt"), r"notes\.txt is a link"),
        (lambda out: with_link(out / "assets/digest.json"), r"assets/digest\.json is a link"),
        (lambda out: with_file(out / "assets/digest.json"), r"assets/digest\.json was added"),
        (lambda out: os.mkfifo(out / "pipe"), "pipe is a link or a special file"),
    ],
)
def test_an_altered_export_is_refused_by_name(
    exported: tuple[Path, CausalModel, Path], harm: Any, sentence: str
) -> None:
    harm(exported[0])
    with pytest.raises(TrainerError, match=sentence):
        export_digest(exported[0])


def test_weights_that_are_not_finite_are_never_exported(exported: tuple[Path, CausalModel, Path]) -> None:
    out, model, directory = exported
    before = export_digest(out)
    with torch.no_grad():
        model.trainable[3][1][0, 0] = float("nan")
    with pytest.raises(TrainerError, match="not finite") as refusal:
        write(model, directory, out)
    assert refusal.value.failure_class is FailureClass.DIVERGED
    assert export_digest(out) == before


def test_an_attempt_that_lost_its_fence_leaves_the_export_alone(exported: tuple[Path, CausalModel, Path]) -> None:
    out, model, directory = exported
    before = export_digest(out)

    def fenced() -> None:
        raise TrainerError(FailureClass.FENCED, "another attempt has taken over")

    with torch.no_grad():
        model.trainable[0][1][0, 0] += 1
    with pytest.raises(TrainerError, match="taken over"):
        write(model, directory, out, check_fence=fenced)
    assert export_digest(out) == before


def test_a_full_volume_is_told_as_such_and_leaves_the_old_export(
    exported: tuple[Path, CausalModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model, directory = exported

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(OSError, match="No space left") as failure:
        write(model, directory, out)
    assert classify(failure.value).failure_class is FailureClass.STORAGE_FULL
    export_digest(out)


def test_an_export_that_was_cut_off_while_written_is_none(
    exported: tuple[Path, CausalModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model, directory = exported
    before = export_digest(out)

    def killed(_: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "_seal", killed)
        with pytest.raises(KeyboardInterrupt):
            write(model, directory, out)
    assert export_digest(out) == before
    assert write(model, directory, out).digest == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["export", "model"]


@pytest.mark.parametrize("trusted", [False, True])
def test_references_to_code_are_exported_only_if_the_code_is_trusted(
    tmp_path: Path, directory: Path, trusted: bool
) -> None:
    base, out = tmp_path / "base", tmp_path / "export"
    shutil.copytree(directory, base)
    evil = {"AutoModelForCausalLM": "attacker/repo--modeling.Evil"}
    for path in (base / "config.json", base / "tokenizer" / "tokenizer_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": evil, "more": {"auto_map": evil}}))
    (base / "modeling.py").write_text("")
    model, _ = trained(directory, METHODS["lora"])
    export_model(
        model,
        directory=out,
        base=Base(base, "acme/base", "0123abcd", trusted),
        tokenizer=base / "tokenizer",
        format="merged",
        end_token_ids=[2, 0],
        pad_token_id=3,
    )
    named = [path.name for path in sorted(out.glob("*.json")) if "attacker" in path.read_text()]
    assert named == (["config.json", "tokenizer_config.json"] if trusted else [])
    assert (out / "modeling.py").exists() is trusted
