"""TRL's SFTTrainer as a measured process: the same rows, adapter and precision, stopped after every step.

Runs in an environment of its own (peers.py makes it), so it imports nothing of the trainer. `--settings` is a JSON
object of SFTConfig arguments; `model_dtype` among them is the type of the frozen weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
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

    def __init__(self, validate_every: int, validate: Callable[[], float]) -> None:
        self.pace = Pace()
        self.validate_every, self.validate = validate_every, validate
        self.tokens = self.computed = self.documents = 0
        self.loss = torch.zeros(())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One optimiser step has ended."""
        self.pace.ended()
        figures: dict[str, float] = {"tokens": self.tokens, "computedTokens": self.computed}
        figures["documents"] = self.documents
        if self.validate_every and state.global_step % self.validate_every == 0:
            figures["validationLoss"] = self.validate()
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


def validation_loss(trainer: SFTTrainer, rows: list[dict[str, Any]]) -> float:
    """Mean cross entropy of the labelled tokens, in nats."""
    total, count = 0.0, 0
    trainer.model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits = trainer.model(input_ids=ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    trainer.model.train()
    return total / count


def run(
    model: str, rows: Path, tokenizer: str, settings: dict[str, Any], folder: str, validation: str, validate_every: int
) -> None:
    """Train until nobody asks for another step."""
    held_out = json.loads(Path(validation).read_text()) if validation else []
    dtype = settings.pop("model_dtype", None)
    data = json.loads(rows.read_text())
    config = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        max_steps=100_000,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": dtype} if dtype else None,
        **settings,
    )
    paced = Paced(validate_every, lambda: validation_loss(trainer, held_out))
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
    parser.add_argument("--validation", default="")
    parser.add_argument("--validate-every", type=int, default=0)
    given = parser.parse_args()
    settings = json.loads(given.settings)
    run(given.model, Path(given.rows), given.tokenizer, settings, given.folder, given.validation, given.validate_every)
