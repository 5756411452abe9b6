"""TRL's SFTTrainer as a measured process: the same rows, adapter and precision, stopped after every step.

Runs in an environment of its own (peers.py makes it), so it imports nothing of the trainer. `--settings` is a JSON
object of SFTConfig arguments; `model_dtype` among them is the type of the frozen weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.pace import Pace
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Paced(TrainerCallback):
    """Reports each optimiser step and waits for the next."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.tokens = self.computed = self.documents = 0
        self.loss = torch.zeros(())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One optimiser step has ended."""
        figures = {"tokens": self.tokens, "computedTokens": self.computed, "documents": self.documents}
        self.tokens = self.computed = self.documents = 0
        self.pace.step(**figures, loss=float(self.loss))


class Measured(SFTTrainer):
    """Counts the tokens of each micro-batch and takes the rows in their order."""

    paced: Paced

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        """A micro-batch: its tokens without padding, those that are computed, its documents."""
        ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        self.paced.computed += ids.numel()
        self.paced.tokens += int(mask.sum()) if mask is not None else ids.numel()
        self.paced.documents += int((positions == 0).sum()) if positions is not None else len(ids)
        self.paced.loss = loss = super().training_step(model, inputs, *rest, **named)
        return loss


def run(model: str, rows: Path, tokenizer: str, settings: dict[str, Any], folder: str) -> None:
    """Train until nobody asks for another step."""
    dtype = settings.pop("model_dtype", None)
    data = json.loads(rows.read_text())
    config = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        max_steps=100_000,
        learning_rate=2e-4,
        warmup_ratio=0.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": dtype} if dtype else None,
        **settings,
    )
    paced = Paced()
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Measured(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
        peft_config=lora,
        callbacks=[paced],
    )
    trainer.paced = paced
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "rows", "tokenizer", "settings", "folder"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    run(given.model, Path(given.rows), given.tokenizer, json.loads(given.settings), given.folder)
