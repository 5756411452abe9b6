"""What `prepared/` holds: the one file through which Train and Evaluate find everything else."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Literal

from finetune_api.base import ApiModel, Stage
from finetune_api.traits import Task
from finetune_trainer.digest import refuse_other

MANIFEST_FILE = "manifest.json"


class PreparedModel(ApiModel):
    """Where the base model lies and which one exactly it is."""

    directory: str
    """Absolute; config, safetensors and tokenizer as transformers loads them."""
    source: str
    """Repository, or path as the user wrote it."""
    commit: str = ""
    """Commit on the Hub; empty for a path."""
    digest: str
    """sha256 over names and contents of the weight files and the config."""
    nf4_directory: str | None = None
    """Absolute; the 4-bit copy, for `qlora`."""
    adapter_directory: str | None = None
    """Absolute; the adapter that training goes on from."""
    adapter_source: str = ""
    """Repository and commit, or path and digest, of that adapter."""


class PreparedDataset(ApiModel):
    """One dataset of the mixture."""

    index: int
    """`StoredDocument.dataset` of its documents."""
    name: str
    """Name in the spec."""
    task: Task
    """What its rows teach."""
    labels: list[str] = []
    """Labels of a classification, sorted; candidates of its evaluation rows are in this order."""
    source: str
    """Repository and commit, or path and sha256."""
    train: int
    """Documents in `train/`."""
    validation: int
    """Documents in `validation/`."""
    test: int
    """Rows in `evaluation/<name>.jsonl`."""
    evaluation_split: Literal["test", "validation", "unseen half of validation", "none"] = "test"
    """Which rows `evaluation/<name>.jsonl` holds."""
    weight: float = 1.0
    """Examples an epoch as a multiple of `train`."""
    loss_weight: float = 1.0
    """Factor on its share of the loss."""
    notes: list[str] = []
    """What was chosen for its rows and found in them, in sentences."""


class Span(ApiModel):
    """Labelled token counts of one store."""

    documents: int
    tokens: int
    labelled: int
    longest: int


class PreparedManifest(ApiModel):
    """The content of `prepared/`."""

    version: Literal[1] = 1
    config_digest: str
    """sha256 of the parts of the run config that Prepare reads: another one prepares anew."""
    model: PreparedModel
    """The base model."""
    tokenizer: str = "tokenizer"
    """Directory relative to `prepared/`: the tokenizer with the chat template and pad token used."""
    pad_token_id: int
    """Token of padding; never one that ends an answer."""
    end_token_ids: list[int]
    """Tokens that end an answer: generation stops at any of them."""
    datasets: list[PreparedDataset]
    """The mixture, in the order of the spec."""
    train: Span
    """Totals of `train/`."""
    validation: Span
    """Totals of `validation/`."""
    evaluation_split: str
    """Which rows `evaluation/` holds: the datasets' `evaluation_split`, with names where they differ."""
    digest: str
    """sha256 over names and contents of all prepared files but this one."""

    def dataset(self, name: str) -> PreparedDataset:
        """The dataset of that name; KeyError where there is none."""
        found = next((dataset for dataset in self.datasets if dataset.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def write(self, prepared: Path) -> None:
        """Write `manifest.json` into that directory."""
        (prepared / MANIFEST_FILE).write_text(self.model_dump_json(by_alias=True, indent=1))

    @classmethod
    def read(cls, prepared: Path, reported: str = "") -> PreparedManifest:
        """The manifest of that directory. reported: its digest, as Prepare reported it.

        Raises OSError where there is none, ValueError where it is damaged, TrainerError where it is another one.
        """
        content = (prepared / MANIFEST_FILE).read_bytes()
        refuse_other(f"prepared/{MANIFEST_FILE}", sha256(content).hexdigest(), reported, Stage.PREPARE)
        return cls.model_validate_json(content)
