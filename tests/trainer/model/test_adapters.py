"""Which modules are adapted, and what adapters start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.support.architectures import tiny_architecture
from tests.support.batches import examples, packed, padded
from tests.support.loading import load, tuning
from tests.support.tiny import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from finetune_api.spec import Lora, Tuning
from finetune_trainer.failures import TrainerError
from finetune_trainer.model import adapters


def adapted(directory: Path, how: Tuning) -> set[str]:
    """Names of the adapted modules, such as `0.q_proj`."""
    layers = adapters.lora_layers(load(directory, how).causal_lm)
    parts = (name.replace("model.layers.", "").split(".") for name in layers)
    return {f"{name[0]}.{name[-1]}" if len(name) > 1 else name[0] for name in parts}


@pytest.mark.parametrize(("text", "layers"), [("3", [3]), ("0-2", [0, 1, 2]), ("8,0-1,1-2", [0, 1, 2, 8])])
def test_layers_are_numbers_and_ranges(text: str, layers: list[int]) -> None:
    assert Lora(layers=text).layer_numbers == layers


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {f"{layer}.{name}" for layer in "012" for name in LINEAR}),
        ({"layers": "1-2"}, {f"{layer}.{name}" for layer in "12" for name in LINEAR}),
        ({"targetModules": "q_proj, v_proj"}, {f"{layer}.{name}" for layer in "012" for name in ("q_proj", "v_proj")}),
        ({"targetModules": "q_proj,lm_head", "layers": "2"}, {"2.q_proj", "lm_head"}),
        ({"targetModules": "q_proj,lm_head"}, {"0.q_proj", "1.q_proj", "2.q_proj", "lm_head"}),
        ({"targetModules": r".*\.(up|down)_proj"}, {f"{i}.{name}_proj" for i in "012" for name in ("up", "down")}),
        ({"targetModules": r".*\.up_proj", "layers": "0"}, {"0.up_proj"}),
    ],
)
def test_adapters_are_where_the_spec_says(tmp_path: Path, fields: dict[str, object], expected: set[str]) -> None:
    assert adapted(tiny_llama(tmp_path, layers=3), tuning(**fields)) == expected


def test_transposed_linear_layers_are_adapted_too(tmp_path: Path) -> None:
    directory = tiny_architecture(tmp_path, "gpt2")
    model = load(directory, tuning(targetModules="c_attn", init="pissa", rank=4))
    plain = load(directory, tuning("full"))
    batch = packed(examples([5, 9]))
    torch.testing.assert_close(model.eval()(batch), plain.eval()(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "sentence", "field"),
    [
        (tuning(targetModules="q_porj"), "no module q_porj; it has .*q_proj", "tuning.lora.targetModules"),
        (tuning(targetModules=r".*\.nothing"), "no module", "tuning.lora.targetModules"),
        (tuning(layers="1-2"), "numbered 0 to 1", "tuning.lora.layers"),
        (tuning(modulesToSave=["head"]), "no module head; it has .*lm_head", "tuning.lora.modulesToSave"),
    ],
)
def test_modules_and_layers_that_are_not_there_are_named(
    tmp_path: Path, how: Tuning, sentence: str, field: str
) -> None:
    with pytest.raises(TrainerError, match=sentence) as refusal:
        load(tiny_llama(tmp_path), how)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("architecture", "how", "sentence", "field"),
    [
        ("mixtral", tuning(init="pissa", rank=4), "PiSSA takes single matrices apart", "tuning.lora.init"),
        (
            "mixtral",
            tuning(targetModules="w1"),
            "no module w1; it has down_proj, gate_up_proj",
            "tuning.lora.targetModules",
        ),
        ("mixtral", tuning(dora=True), "does not work with use_dora", "tuning"),
        ("mamba", tuning(), "has no attention", "model"),
    ],
)
def test_what_an_architecture_cannot_do_is_refused_in_a_sentence(
    tmp_path: Path, architecture: str, how: Tuning, sentence: str, field: str
) -> None:
    with pytest.raises(TrainerError, match=sentence) as refusal:
        load(tiny_architecture(tmp_path, architecture), how)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("architecture", "left_out"),
    [
        ("qwen2_moe", "mlp.experts.down_proj, mlp.experts.gate_up_proj"),
        ("granitemoe", "block_sparse_moe.experts.down_proj, block_sparse_moe.experts.gate_up_proj"),
        ("mixtral", ""),
        ("llama", ""),
    ],
)
def test_what_all_linear_leaves_out_is_said(tmp_path: Path, architecture: str, left_out: str) -> None:
    choices = load(tiny_architecture(tmp_path, architecture)).choices
    assert (choices["targetModules"].why if "targetModules" in choices else "") == (
        f"adapts all but {left_out}" if left_out else ""
    )


def test_prefix_tuning_refuses_to_recompute_activations(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="does not support activation checkpointing"):
        load(tiny_llama(tmp_path), tuning("prefix"), activation_checkpointing=True)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_refuse_packed_documents(tmp_path: Path, method: str) -> None:
    with pytest.raises(ValueError, match="needs padded batches"):
        load(tiny_llama(tmp_path), tuning(method))(packed(examples([5])))


# --- first values ----------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    directory, batch = tiny_llama(tmp_path), packed(examples([9, 14]))
    base = load(directory, tuning("full")).eval()(batch)
    for fields in ({}, {"dora": True}, {"init": "gaussian"}, {"init": "pissa", "rank": 4}, {"rslora": True}):
        losses = load(directory, tuning(**fields)).eval()(batch)
        torch.testing.assert_close(losses, base, rtol=1e-5, atol=1e-5)


def test_first_values_follow_from_the_seed_alone(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)

    def values(seed: int) -> torch.Tensor:
        torch.rand(seed + 5)  # the process's own random state plays no part
        return torch.cat([parameter.detach().flatten() for _, parameter in load(directory, seed=seed).trainable])

    assert torch.equal(values(1), values(1))
    assert not torch.equal(values(1), values(2))


@pytest.mark.parametrize(("init", "deviation"), [("default", 1 / 3**0.5 / 64**0.5), ("gaussian", 1 / 16)])
def test_first_values_have_the_spread_of_peft(tmp_path: Path, init: str, deviation: float) -> None:
    model = load(tiny_llama(tmp_path, hidden=64), tuning(init=init, targetModules="q_proj,up_proj"))
    a = torch.cat([p.detach().flatten() for name, p in model.trainable if ".lora_A." in name])
    assert abs(float(a.std()) / deviation - 1) < 0.05
    assert not any(parameter.any() for name, parameter in model.trainable if ".lora_B." in name)


def test_dora_magnitudes_are_those_of_peft(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    peft_model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory), LoraConfig(use_dora=True, target_modules="all-linear")
    )
    expected = {name: p for name, p in peft_model.named_parameters() if "magnitude" in name}
    found = {name.removeprefix("model."): p for name, p in load(directory, tuning(dora=True)).trainable}
    assert expected
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter)


def test_dora_refuses_rows_of_zeros(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="lm_head has rows of zeros"):  # the padding token of a tied head
        load(tiny_llama(tmp_path), tuning(dora=True, targetModules="lm_head"))


@pytest.mark.parametrize("exact", [True, False])
def test_pissa_moves_the_principal_part_of_each_matrix_into_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    monkeypatch.setattr(adapters, "EXACT_SVD_ELEMENTS", 2**22 if exact else 0)
    directory = tiny_llama(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(directory).model.layers[0].self_attn.q_proj.weight
    layer = load(directory, tuning(init="pissa", rank=4)).causal_lm.model.layers[0].self_attn.q_proj
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(layer.base_layer.weight + delta, original, rtol=1e-4, atol=1e-6)
    values = torch.linalg.svdvals(original)
    torch.testing.assert_close(torch.linalg.svdvals(delta)[:4], values[:4], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.base_layer.weight, 2), values[4], rtol=1e-2, atol=1e-5)


def test_a_prompt_starts_from_the_embeddings_of_its_text_repeated(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    model = load(directory, tuning("prompt", virtualTokens=5, initText="abc"))
    _, prompt = model.trainable[0]
    embedding = model.causal_lm.get_input_embeddings().weight
    ids = [next(i for i in range(260) if torch.equal(embedding[i], row)) for row in prompt]
    assert ids[:2] == ids[3:]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_leave_other_rows_and_padding_alone(tmp_path: Path, method: str) -> None:
    model = load(tiny_llama(tmp_path), tuning(method)).eval()
    documents = examples([5, 17, 9])
    together = model(padded(documents))
    apart = torch.cat([model(padded([document])) for document in documents])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


# --- going on from an adapter ----------------------------------------------------------------------------------------


def existing_adapter(directory: Path, out: Path, **fields: object) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields),
    )
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": "all-linear", "use_dora": True, "use_rslora": True},
        {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_training_goes_on_from_an_adapter_with_its_own_shape(tmp_path: Path, fields: dict[str, object]) -> None:
    directory = tiny_llama(tmp_path / "model", tied=False)
    adapter = existing_adapter(directory, tmp_path / "adapter", **fields)
    model = load(directory, tuning(rank=99), adapter_directory=adapter)
    kept = load_file(adapter / "adapter_model.safetensors")
    found = {adapters.file_key(name.removeprefix("model.")): p.detach() for name, p in model.trainable}
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_an_adapter_that_is_none_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "model")
    with pytest.raises(TrainerError, match=r"adapter_config\.json is missing"):
        load(directory, adapter_directory=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}))
    with pytest.raises(TrainerError, match="only LoRA adapters can be trained further"):
        load(directory, adapter_directory=tmp_path)


def test_an_adapter_of_another_model_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    adapter = existing_adapter(
        tiny_llama(tmp_path / "wide", hidden=96), tmp_path / "adapter", target_modules=["q_proj"]
    )
    with pytest.raises(TrainerError, match=r"q_proj\.lora_A\.weight has shape \[8, 96\]"):
        load(tiny_llama(tmp_path / "narrow"), adapter_directory=adapter)


# --- what is computed ------------------------------------------------------------------------------------------------


def test_no_graph_is_built_below_the_lowest_adapted_layer(tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path, layers=4), tuning(layers="2-3"))
    graphs: list[bool] = []
    for layer in model.causal_lm.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: graphs.append(output.requires_grad))
    model(packed(examples([9]))).sum().backward()
    assert graphs == [False, False, True, True]


def test_recomputing_activations_changes_no_gradient(tmp_path: Path) -> None:
    directory, batch = tiny_llama(tmp_path), packed(examples([9, 30]))
    for how in (tuning("full"), tuning(layers="1"), tuning(dora=True)):
        kept, recomputed = load(directory, how), load(directory, how, activation_checkpointing=True)
        for model in (kept, recomputed):
            model(batch).sum().backward()
        for (name, one), (_, other) in zip(kept.trainable, recomputed.trainable, strict=True):
            assert torch.equal(one.grad, other.grad), name


def test_dropout_of_the_adapter_works_in_training_alone(tmp_path: Path) -> None:
    directory, batch = tiny_llama(tmp_path), packed(examples([30]))
    model = load(directory, tuning(dropout=0.5, init="pissa", rank=8))
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


def test_compiled_layers_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_usual = nn.Module.compile  # traced and differentiated as always, but not turned into C++, which takes a minute
    monkeypatch.setattr(nn.Module, "compile", lambda self: as_usual(self, backend="aot_eager"))
    directory, batch = tiny_llama(tmp_path, layers=1), packed(examples([9, 30]))
    plain, compiled = load(directory), load(directory, compile=True)
    assert all(layer._compiled_call_impl for layer in compiled.causal_lm.model.layers)
    for model in (plain, compiled):
        model(batch).sum().backward()
    for (name, one), (_, other) in zip(plain.trainable, compiled.trainable, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
