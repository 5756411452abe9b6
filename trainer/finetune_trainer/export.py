"""Writes the trained model as the directory that Evaluate loads, Publish uploads and users load.

It is written aside, flushed to disk, read back, then renamed. `digest.json` names every file.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from finetune_api.report import FailureClass
from finetune_trainer.digest import export_digest, files_of, write_digest
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import ADAPTER_WEIGHTS, flush
from finetune_trainer.model import adapters
from finetune_trainer.model.adapters import base_name
from finetune_trainer.model.build import CausalModel
from finetune_trainer.model.weights import ModelWeights, SafetensorsDirectory, empty_model, read_config, whole_on_leader
from finetune_trainer.model.writer import ShardWriter, save_tensors


@dataclass(frozen=True)
class Base:
    """The files of the base model, and its name."""

    directory: Path
    """config.json, safetensors, generation_config.json."""
    name: str
    """Repository, or the path as the user wrote it."""
    revision: str | None = None
    """Commit on the Hub."""
    remote_code: bool = False
    """Its Python code was run. Otherwise no reference to code is exported: whoever trusts the export would run it."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    digest: str
    format: Literal["adapter", "merged", "model"]
    size_bytes: int


def export_model(
    model: CausalModel,
    *,
    directory: Path,
    base: Base,
    tokenizer: Path,
    format: Literal["adapter", "merged"],
    end_token_ids: list[int],
    pad_token_id: int,
    check_fence: Callable[[], None] = lambda: None,
) -> Exported:
    """Write the model to `directory` (replaced if there). Collective; returns on all ranks once it is durable.

    `adapter`: adapter, tokenizer, generation config. `merged`: the adapter is added to the base's own unquantised
    weights, tensor by tensor. Full tuning writes the whole model, whatever `format` says. Weights keep the data types
    of the base's files. Rank 0 calls `check_fence` before the rename.
    Raises TrainerError if a trained weight is not finite or a file cannot be read back as it was written.
    """
    leader = not dist.is_initialized() or dist.get_rank() == 0
    kind: Literal["adapter", "merged", "model"] = "model" if model.method.traits.trains_base else format
    if kind == "merged" and not model.method.traits.can_merge:
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"{model.method} tuning cannot be merged into the weights: use adapter.",
            "publish.format",
        )
    aside = directory.with_name(f".{directory.name}.writing")
    if leader:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    if kind == "adapter":
        _write_adapter(_gathered(model, leader), model, aside, base, leader)
    else:
        _write_weights(model, kind, aside, base, leader)
    exported: list[Exported | None] = [None]
    if leader:
        _write_companions(aside, base, tokenizer, end_token_ids, pad_token_id)
        digest = _seal(aside)
        check_fence()
        _publish(aside, directory)
        exported[0] = Exported(digest, kind, sum(path.stat().st_size for path in files_of(directory)))
    if dist.is_initialized():
        dist.broadcast_object_list(exported, src=0)
    assert exported[0] is not None
    return exported[0]


# --- what was trained ------------------------------------------------------------------------------------------------


def _gathered(model: CausalModel, leader: bool) -> dict[str, Tensor]:
    """The trained tensors by their names in the PEFT model, whole, on the leader's CPU; empty on the other ranks."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.trainable:
        tensor = whole_on_leader(parameter.detach())
        if leader:
            found[name.removeprefix("model.")] = _finite(name, tensor.cpu())
    return found


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise TrainerError(
            FailureClass.DIVERGED, f"The trained weights are not finite ({name}), so nothing was exported.", "training"
        )
    return tensor


def _write_adapter(state: dict[str, Tensor], model: CausalModel, out: Path, base: Base, leader: bool) -> None:
    peft_model = model.model
    assert isinstance(peft_model, PeftModel)
    initial = _initial(model, leader)
    if not leader:
        return
    config = copy.copy(peft_model.peft_config[adapters.ADAPTER])
    config.base_model_name_or_path = base.name
    config.revision = base.revision
    config.inference_mode = True
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    tensors = {adapters.file_key(name): tensor for name, tensor in state.items()}
    if config.is_prompt_learning:
        tensors = {"prompt_embeddings": next(iter(state.values()))}
    if initial:
        tensors = _without_principal(tensors, initial)
        assert isinstance(config, LoraConfig)
        config.lora_alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
        config.r = 2 * config.r
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, out / ADAPTER_WEIGHTS)
    config.save_pretrained(str(out))


def _initial(model: CausalModel, leader: bool) -> dict[str, Tensor]:
    """PiSSA's first A and B by the adapter file's names, whole, on the leader; empty for other methods. Collective."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.initial.items():
        full = whole_on_leader(tensor)
        if leader:
            found[adapters.file_key(name.removeprefix("model."))] = full.cpu()
    return found


def _without_principal(tensors: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA as a plain LoRA of twice the rank on the untouched base: B A - B0 A0 = [B, -B0] [A; A0]."""
    found = dict(tensors)
    for name, first in initial.items():
        is_a = ".lora_A." in name
        found[name] = torch.cat([tensors[name], first if is_a else -first], 0 if is_a else 1)
    return found


# --- whole models ----------------------------------------------------------------------------------------------------

NewValue = Callable[[Tensor], Tensor]
"""From a parameter's value in the base's files to its trained value; collective for full tuning."""


def _write_weights(model: CausalModel, kind: str, out: Path, base: Base, leader: bool) -> None:
    """The base's files with new values, in their own layout and data types, one tensor at a time.

    Raises RuntimeError if no file took a value that was trained.
    """
    changes = _full_values(model) if kind == "model" else _merged_values(model, leader)
    tied = {base_name(a): base_name(b) for a, b in (model.causal_lm.all_tied_weights_keys or {}).items()}
    untie = kind == "merged" and any(a in changes or b in changes for a, b in tied.items())
    if kind == "model":
        changes |= {a: changes[b] for a, b in tied.items() if b in changes}
    taken: set[str] = set()
    writer = ShardWriter(out)
    skeleton = empty_model(read_config(base.directory), torch.float32)
    with SafetensorsDirectory(base.directory) as files:
        weights = ModelWeights(files, skeleton)

        def value(name: str, source: str) -> Tensor:
            taken.add(name)
            old = weights.read(source) if leader and not (kind == "model" and name in changes) else torch.empty(0)
            return changes[name](old).to(weights.dtype(source)) if name in changes else old

        def add(name: str, tensor: Tensor) -> None:
            if leader:
                writer.add(name, _finite(name, tensor.cpu()))

        for name, source in weights.direct.items():
            add(source, value(name, name))
        for targets in weights.groups.values():
            values = {name: value(name, name) for name in targets}
            for name, tensor in (revert_weight_conversion(skeleton, values) if leader else {}).items():
                add(name, tensor)
        for pair in tied.items() if untie else ():
            for name, other in (pair, pair[::-1]):
                if name not in weights:
                    add(name, value(name, other))
    _refuse_lost(changes.keys() - taken, tied if kind == "model" else {})
    if leader:
        writer.close()
        _write_model_config(base, out, untie)


def _refuse_lost(lost: set[str], tied: dict[str, str]) -> None:
    """Raise RuntimeError for trained values that no file took; files may hold a tied weight once."""
    lost = {name for name in lost if not any(name in pair and not lost.issuperset(pair) for pair in tied.items())}
    if lost:
        raise RuntimeError(f"no file of the export took the trained values of {', '.join(sorted(lost)[:5])}")


def _full_values(model: CausalModel) -> dict[str, NewValue]:
    def gather(parameter: Tensor) -> NewValue:
        return lambda _: whole_on_leader(parameter.detach())

    return {name.removeprefix("model."): gather(parameter) for name, parameter in model.trainable}


def _merged_values(model: CausalModel, leader: bool) -> dict[str, NewValue]:
    """For each changed parameter of the base, how its new value follows from the one in the files."""
    initial = _initial(model, leader)
    state = {adapters.file_key(name): tensor for name, tensor in _gathered(model, leader).items()}
    names = {adapters.file_key(name): name for name in (name.removeprefix("model.") for name, _ in model.trainable)}
    found: dict[str, NewValue] = {}
    for path, layer in adapters.lora_layers(model.causal_lm).items():
        prefix = f"base_model.model.{path}"
        own = {f"{prefix}.{part}" for part in adapters.MERGED_PARTS} & names.keys()
        if own:
            target = f"{base_name(path)}.{getattr(layer, 'parameter_name', 'weight')}"
            found[target] = _addition(prefix, layer, state, initial) if leader else _nothing
        names = {key: name for key, name in names.items() if key not in own}
    for key, name in names.items():
        found[base_name(name.removeprefix("base_model.model."))] = _replacement(state[key]) if leader else _nothing
    return found


def _nothing(_: Tensor) -> Tensor:
    return torch.empty(0)


def _replacement(tensor: Tensor) -> NewValue:
    return lambda _: tensor


def _addition(prefix: str, layer: Any, state: dict[str, Tensor], initial: dict[str, Tensor]) -> NewValue:
    """The merged value of one adapted layer, computed in float32; stacked experts one by one, in the files' type."""
    embedding = f"{prefix}.lora_embedding_A" in state
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    key_a, key_b = (f"{prefix}.{name}" for name in names)
    scaling, flip = layer.scaling[adapters.ADAPTER], adapters.transposed(layer)
    magnitude = state.get(f"{prefix}.lora_magnitude_vector")

    def merged(weight: Tensor) -> Tensor:
        if weight.ndim == 3:
            return torch.stack([one_merged(expert, index, len(weight)) for index, expert in enumerate(weight)])
        return one_merged(weight, 0, 1)

    def one_merged(weight: Tensor, expert: int, experts: int) -> Tensor:
        a = state[key_a].reshape(experts, -1, state[key_a].shape[-1])[expert]
        b = state[key_b].reshape(len(state[key_b]), -1, experts)[..., expert]
        matrix: Tensor = weight.float().T if flip else weight.float()
        matrix = matrix + scaling * (b @ a)
        if key_a in initial:
            matrix = matrix - scaling * (initial[key_b] @ initial[key_a])
        if magnitude is not None:
            matrix = matrix * (magnitude / torch.linalg.norm(matrix, dim=1))[:, None]
        return (matrix.T if flip else matrix).to(weight.dtype if experts > 1 else torch.float32)

    return merged


def _read_config(path: Path, base: Base) -> dict[str, Any]:
    """A JSON configuration, without references to code unless the base's code is trusted."""

    def trusted(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if base.remote_code or key != "auto_map"}

    config: dict[str, Any] = json.loads(path.read_text(), object_hook=trusted)
    return config


def _write_model_config(base: Base, out: Path, untie: bool) -> None:
    config = _read_config(base.directory / "config.json", base)
    if untie:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for code in base.directory.glob("*.py") if base.remote_code else ():  # models that come with their own code
        shutil.copyfile(code, out / code.name)


def _write_companions(out: Path, base: Base, tokenizer: Path, end_token_ids: list[int], pad_token_id: int) -> None:
    for path in sorted(tokenizer.rglob("*")):  # named chat templates are in a folder
        copy = out / path.relative_to(tokenizer)
        if path.is_file() and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    tokens = out / "tokenizer_config.json"
    if tokens.exists():
        tokens.write_text(json.dumps(_read_config(tokens, base), indent=2, ensure_ascii=False) + "\n")
    source = base.directory / "generation_config.json"
    generation: dict[str, Any] = _read_config(source, base) if source.exists() else {}
    generation |= {"eos_token_id": end_token_ids, "pad_token_id": pad_token_id}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")


# --- durability -------------------------------------------------------------------------------------------------------


def _seal(directory: Path) -> str:
    """Write `digest.json`, flush everything to disk, and read it all again."""
    write_digest(directory)
    for path in files_of(directory):
        flush(path)
    flush(directory)
    with SafetensorsDirectory(directory) as files:
        for name in files:
            files.shape(name)
    return export_digest(directory)


def _publish(aside: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    aside.rename(directory)
    flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
