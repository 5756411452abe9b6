"""The base model on this machine: fetched or found, checked, described, and in 4 bits where QLoRA asks for it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.architectures import linear_layers, size
from finetune_api.report import FailureClass, ModelFacts
from finetune_api.spec import Model, Quantization, Source
from finetune_trainer import files
from finetune_trainer.data.manifest import PreparedModel
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import made_once, sha256_of
from finetune_trainer.prepare import gguf
from finetune_trainer.prepare.fetched import Fetched
from finetune_trainer.prepare.model_files import (
    ADAPTER_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    check_adapter_files,
    model_files,
)
from finetune_trainer.starting_adapter import read_adapter_config, refuse_other_starts
from finetune_trainer.untrusted import check_model_files, refuse_without_attention, tensor_shapes

UNREADABLE = (ValueError, LookupError, OSError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What the library raises for a config that is none."""
Tick = Callable[[int], None]
"""Is told how many more files or tensors are done, so that silence means that nothing is done."""


@dataclass(frozen=True)
class LocalModel:
    """A model directory and where it came from."""

    directory: Path
    source: str
    commit: str = ""
    """Commit on the Hub, empty for a path."""
    converted: bool = False
    """From GGUF."""


def locate_model(model: Model, fetched: Fetched, resolve: Any, cache: Path, *, convert: bool = True) -> LocalModel:
    """The model's directory, its files checked; without `convert` a GGUF file stays one.

    resolve: `RunContext.resolve_source`. Raises TrainerError (bad-spec).
    """
    local = _locate_model(model, fetched, resolve, cache, convert=convert)
    if not local.converted:
        check_model_files(local.directory)
    return local


def _locate_model(model: Model, fetched: Fetched, resolve: Any, cache: Path, *, convert: bool) -> LocalModel:
    if model.repo is not None:
        repo = fetched.repository("model")
        return LocalModel(cache / repo.directory, model.repo, repo.commit)
    given = str(model.path)
    path: Path = resolve(given, "model.path")
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or len(ggufs) != 1:
            model_files([file.name for file in path.iterdir()], model)
            return LocalModel(path.resolve(), given)
        path = ggufs[0]
    elif path.suffix.lower() != ".gguf":
        raise TrainerError(
            FailureClass.BAD_SPEC, f"{given} is neither a directory with safetensors nor a .gguf file.", "model.path"
        )
    converted = gguf.converted_directory(path, cache / "models")
    if convert or (converted / files.DONE).exists():
        path = gguf.convert(path, cache / "models")
    return LocalModel(path, given, converted=True)


def locate_adapter(model: Model, fetched: Fetched, resolve: Any, cache: Path) -> tuple[Path, str] | None:
    """(directory, origin) of the adapter to go on from, or None. Raises TrainerError where it is no LoRA adapter."""
    source: Source | None = model.adapter
    if source is None:
        return None
    if source.repo is not None:
        repo = fetched.repository("model.adapter")
        directory, origin = cache / repo.directory, f"{source.repo}@{repo.commit}"
    else:
        directory = resolve(str(source.path), "model.adapter.path")
        check_adapter_files([name for name in ADAPTER_FILES if (directory / name).is_file()], source)
        origin = f"{source.path} sha256:{digest_of(directory, ADAPTER_FILES)}"
    kind = _kind_of_adapter(directory)
    if kind != "LORA":
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"{source.repo or source.path} is a {kind} adapter; only LoRA adapters can be trained further.",
            "model.adapter.repo" if source.repo else "model.adapter.path",
        )
    refuse_other_starts(directory)
    return directory.resolve(), origin


def _kind_of_adapter(directory: Path) -> str:
    """PEFT's name of the adapter's kind; `damaged` where its config is no JSON object."""
    config = read_adapter_config(directory)
    return "damaged" if config is None else str(config.get("peft_type"))


def load_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's config, checked to be one that can be trained here.

    Raises TrainerError (bad-spec): already quantised, no causal language model, unknown architecture.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (*UNREADABLE, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrainerError(
            FailureClass.BAD_SPEC, f"The model's config cannot be read: {reason[:400]}", "model"
        ) from error
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"The model is already quantised ({method or 'unknown'!s}) and cannot be tuned. "
            "Use the unquantised model; tuning.method: qlora quantises it.",
            "model",
        )
    names = getattr(config, "architectures", None) or []
    known = type(config).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (not names or set(names) & causal)
    refuse_without_attention(config)
    if not known and not trust_remote_code:
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"{', '.join(names) or config.model_type} is not a causal language model; only those can be tuned.",
            "model",
        )
    return config


def describe(config: Any, directory: Path) -> ModelFacts:
    """Shape of the model from its config, parameters counted from the headers of its files.

    Raises TrainerError (bad-spec) naming what cannot be the shape of a model.
    """
    try:
        return _describe(config, directory)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = re.sub("([A-Z])", r"_\1", str(first["loc"][0])).lower()
        why = f"{name}: {first['msg']}"
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:400]
    raise TrainerError(FailureClass.BAD_SPEC, f"The model's config cannot be used ({why}).", "model")


def _describe(config: Any, directory: Path) -> ModelFacts:
    text = config.get_text_config()
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    heads = int(text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or int(text.hidden_size) // heads
    tied = bool(getattr(text, "tie_word_embeddings", False))
    return ModelFacts(
        architecture=architecture,
        hidden_size=int(text.hidden_size),
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        num_hidden_layers=int(text.num_hidden_layers),
        num_attention_heads=heads,
        num_key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        vocab_size=int(text.vocab_size),
        tie_word_embeddings=tied,
        attention_bias=bool(getattr(text, "attention_bias", False)),
        max_position_embeddings=int(getattr(text, "max_position_embeddings", None) or 0),
        parameters=count_parameters(directory, tied=tied),
        num_experts=size(text.to_dict(), "num_experts"),
        experts_per_token=int(getattr(text, "num_experts_per_tok", None) or 0),
        linear_layers=linear_layers(architecture, text.to_dict()),
    )


def count_parameters(directory: Path, *, tied: bool) -> int:
    """Elements of all tensors, from the files' headers alone; a tied head that was saved too is not counted."""
    total = 0
    for path in sorted(directory.glob("model*.safetensors")):
        for name, shape in tensor_shapes(path).items():
            if not (tied and name == "lm_head.weight"):
                total += math.prod(shape)
    return total


def model_digest(directory: Path, cache: Path, tick: Tick = lambda count: None) -> str:
    """sha256 over names and contents of weights, config and tokenizer, remembered while the files do not change."""
    names = sorted(
        path.name
        for path in directory.iterdir()
        if any(fnmatch(path.name, pattern) for pattern in (*WEIGHT_FILES, *TOKENIZER_FILES))
    )
    stats = [(name, (directory / name).stat()) for name in names]
    state = repr([(str(directory), name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats])
    remembered = cache / "digests" / sha256(state.encode()).hexdigest()
    if remembered.exists():
        return remembered.read_text()
    digest = digest_of(directory, names, tick)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    aside = remembered.with_suffix(f".{os.getpid()}")
    aside.write_text(digest)
    aside.rename(remembered)
    return digest


def digest_of(directory: Path, names: Sequence[str], tick: Tick = lambda count: None) -> str:
    """sha256 over the files' names and digests."""
    lines = []
    for name in sorted(names):
        lines.append(f"{name}\0{sha256_of(directory / name)}\n")
        tick(1)
    return sha256("".join(lines).encode()).hexdigest()


def nf4_copy(model: PreparedModel, quantization: Quantization, cache: Path, tick: Tick) -> Path:
    """Directory of the 4-bit copy, written once to the cache: keyed by the weights and the quantisation."""
    from finetune_trainer.model.nf4 import quantization_key, write_nf4_copy

    directory = cache / "models" / f"{quantization.type}-{quantization_key(model.digest, quantization)}"
    return made_once(directory, lambda aside: write_nf4_copy(Path(model.directory), aside, quantization, tick))


def quantised_share(directory: Path) -> float:
    """Share of the parameters of a 4-bit copy that are stored in 4 bits, two to a byte."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        shapes |= tensor_shapes(path)
    packed = {name.partition(".weight.")[0] + ".weight" for name in shapes if ".weight." in name}
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if ".weight." not in name}
    in_four_bits = sum(2 * size for name, size in sizes.items() if name in packed)
    return in_four_bits / max(1, in_four_bits + sum(size for name, size in sizes.items() if name not in packed))
