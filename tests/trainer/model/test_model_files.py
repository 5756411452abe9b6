"""Model directories: several files, other names, things that do not fit; the 4-bit copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.architectures import tiny_architecture
from tests.support.batches import examples, packed
from tests.support.loading import load, tuning
from tests.support.tiny import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_api.spec import Quantization
from finetune_trainer.failures import TrainerError
from finetune_trainer.model import nf4
from finetune_trainer.model.nf4 import quantization_key, write_nf4_copy
from finetune_trainer.model.weights import SafetensorsDirectory
from finetune_trainer.model.writer import ShardWriter


def test_a_model_in_several_files_is_read_as_one(tmp_path: Path) -> None:
    one, several = tiny_llama(tmp_path / "one"), tmp_path / "several"
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(several, max_shard_size="100KB")
    assert len(list(several.glob("*.safetensors"))) > 2
    batch = packed(examples([9, 5]))
    assert torch.equal(load(one, tuning("full"))(batch), load(several, tuning("full"))(batch))


def test_experts_that_the_files_hold_one_by_one_are_stacked_in_the_model(tmp_path: Path) -> None:
    directory = tiny_architecture(tmp_path, "mixtral")
    names = set(SafetensorsDirectory(directory))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    expected = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    found = load(directory, tuning("full")).causal_lm.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_missing_and_a_misshapen_tensor_are_named(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(TrainerError, match=r"lacks the tensor model\.norm\.weight"):
        load(directory)
    save_file(tensors | {"model.norm.weight": norm[:5].clone()}, file)
    with pytest.raises(TrainerError, match=r"model\.norm\.weight has shape \[5\], but the config requires \[64\]"):
        load(directory)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"config\.json"):
        load(tmp_path)
    directory = tiny_llama(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(TrainerError, match="holds no safetensors files"):
        load(directory)


def test_a_model_that_comes_with_code_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(TrainerError, match="trustRemoteCode"):
        load(directory)
    assert load(directory, trust_remote_code=True)(packed(examples([5]))).isfinite().all()


# --- four bits -------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


@pytest.mark.parametrize("quantization", [Quantization(), Quantization(double_quant=False), Quantization(type="fp4")])
def test_the_copy_holds_what_transformers_would_quantise(
    tmp_path: Path, directory: Path, quantization: Quantization
) -> None:
    write_nf4_copy(directory, tmp_path / "copy", quantization)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    expected = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    wanted, layers = nf4.linear_4bit(expected), nf4.linear_4bit(found)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight.data, wanted[name].weight.data)
        assert layer.weight.quant_state.nested == quantization.double_quant


def test_the_quantised_model_computes_what_transformers_computes_with_the_copy(tmp_path: Path, directory: Path) -> None:
    write_nf4_copy(directory, tmp_path / "copy", Quantization(compute_dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32).train()
    ours = load(directory, tuning("qlora"), nf4_directory=tmp_path / "copy")
    document = examples([23])[0]
    expected = theirs(document.tokens).logits[0, :-1].log_softmax(-1)
    expected = -expected.gather(1, document.tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(ours(packed([document])), expected, rtol=1e-5, atol=1e-5)


def test_evaluation_leaves_the_four_bit_weights_as_they_are(tmp_path: Path, directory: Path) -> None:
    write_nf4_copy(directory, tmp_path / "copy", Quantization())
    model, batch = load(directory, tuning("qlora"), nf4_directory=tmp_path / "copy"), packed(examples([23]))
    before = model(batch).detach()
    with torch.no_grad():  # bitsandbytes would repack weights for inference here on some CPUs
        evaluated = model.eval()(batch)
    assert torch.equal(model.train()(batch).detach(), before)
    assert torch.equal(evaluated, before)


def test_a_model_that_is_already_quantised_is_refused(tmp_path: Path, directory: Path) -> None:
    write_nf4_copy(directory, tmp_path / "copy", Quantization())
    with pytest.raises(TrainerError, match=r"already quantised \(bitsandbytes\)") as refusal:
        write_nf4_copy(tmp_path / "copy", tmp_path / "again", Quantization())
    assert refusal.value.field == "model"
    with pytest.raises(TrainerError, match="already quantised"):
        load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"init": "pissa"}, "a 4-bit base cannot express"), ({"modulesToSave": ["q_proj"]}, "stored in 4 bits")],
)
def test_what_four_bits_cannot_hold_is_refused(
    tmp_path: Path, directory: Path, fields: dict[str, object], sentence: str
) -> None:
    write_nf4_copy(directory, tmp_path / "copy", Quantization())
    with pytest.raises(TrainerError, match=sentence):
        load(directory, tuning("qlora", **fields), nf4_directory=tmp_path / "copy")


def test_copies_are_told_apart_by_model_and_quantisation() -> None:
    keys = [
        quantization_key(commit, Quantization(type=kind, double_quant=double))  # type: ignore[arg-type]
        for commit in ("a", "b")
        for kind in ("nf4", "fp4")
        for double in (True, False)
    ]
    assert len(set(keys)) == 8


def test_a_writer_starts_a_new_file_before_one_grows_too_large(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=1000)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)} | {"large": torch.ones(1000)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors"))[0] == "model-00001-of-00004.safetensors"
    with SafetensorsDirectory(tmp_path) as directory:
        assert set(directory) == set(tensors)
        assert all(torch.equal(directory.read(name), tensors[name]) for name in tensors)
