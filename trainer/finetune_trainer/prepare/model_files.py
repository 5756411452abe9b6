"""Which files of a model or an adapter are needed, by their names alone: nothing is opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

from finetune_api.report import FailureClass
from finetune_api.spec import Model, Source
from finetune_trainer.failures import TrainerError
from finetune_trainer.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

TOKENIZER_FILES = (
    "README.md",  # names the licence, which the card repeats
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "additional_chat_templates/*",
    "config.json", "generation_config.json", "preprocessor_config.json", "sentencepiece*.model", "spiece.model",
)  # fmt: skip
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def model_files(names: Sequence[str], model: Model, *, weights: bool = True) -> list[str]:
    """Which of a model's files are needed; without `weights` those of tokenizer and config.

    Raises TrainerError (bad-spec) where it has no config or no safetensors.
    """
    wanted = [*TOKENIZER_FILES, *(WEIGHT_FILES if weights else ()), *(["*.py"] if model.trust_remote_code else [])]
    where = model.repo or model.path
    field = "model.repo" if model.repo else "model.path"
    if "config.json" not in names:
        raise TrainerError(FailureClass.BAD_SPEC, f"{where} is not a model: it has no config.json.", field)
    if not any(fnmatch(name, pattern) for name in names for pattern in WEIGHT_FILES[:2]):
        pickles = any(fnmatch(name, pattern) for name in names for pattern in PICKLES)
        why = (
            "Its weights are pickle files, which can run code when loaded: convert them to safetensors."
            if pickles
            else "It has no weights in safetensors."
        )
        raise TrainerError(FailureClass.BAD_SPEC, f"{where} cannot be used. {why}", field)
    return [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]


def check_adapter_files(names: Iterable[str], adapter: Source) -> None:
    """Raise TrainerError (bad-spec) unless these are the files of an adapter."""
    missing = [name for name in ADAPTER_FILES if name not in set(names)]
    if missing:
        field = "model.adapter.repo" if adapter.repo else "model.adapter.path"
        sentence = f"{adapter.repo or adapter.path} is not an adapter: {missing[0]} is missing."
        raise TrainerError(FailureClass.BAD_SPEC, sentence, field)
