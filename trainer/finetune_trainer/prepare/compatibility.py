"""What model, tokenizer, adapter and job rule out together: told here, not by a crash while GPUs are held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from finetune_api.architectures import never_packs
from finetune_api.report import FailureClass
from finetune_api.spec import FineTuneJobSpec
from finetune_api.traits import Task
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.evaluation_rows import EvaluationRow, read_evaluation
from finetune_trainer.failures import TrainerError
from finetune_trainer.starting_adapter import refuse_merging_biases


def refuse_combinations(
    spec: FineTuneJobSpec, config: Any, tokenizer: Any, tasks: Iterable[Task], adapter: Path | None
) -> None:
    """Raise TrainerError (bad-spec) for what cannot be trained, as far as it is known without rows and weights.

    config: the model's. adapter: directory of the one that training goes on from.
    """
    for architecture in getattr(config, "architectures", None) or []:
        if spec.training.packing and (why := never_packs(architecture)):
            raise TrainerError(FailureClass.BAD_SPEC, f"{why} Remove training.packing.", "training.packing")
    if tokenizer.eos_token_id is None and any(task.traits.form == "text" for task in tasks):
        raise TrainerError(
            FailureClass.BAD_SPEC,
            "The tokenizer has no end token, which task text puts after each document: set eos_token in its "
            "tokenizer_config.json.",
            "model",
        )
    if adapter is not None and spec.publish is not None and spec.publish.format == "merged":
        refuse_merging_biases(adapter)


def refuse_ids_beyond_embeddings(config: Any, tokenizer: Any, end_token_ids: Iterable[int], prepared: Path) -> None:
    """Raise TrainerError (bad-spec) if prepared rows use tokens for which the model has no embedding."""
    size = int(config.get_text_config().vocab_size)
    if max(chain(tokenizer.get_vocab().values(), [tokenizer.pad_token_id])) < size:
        return
    stores = (DocumentStore(prepared / split) for split in ("train", "validation"))
    of_documents = (int(store.ids.max()) for store in stores if len(store.ids))
    rows = chain.from_iterable(read_evaluation(path) for path in sorted((prepared / "evaluation").glob("*.jsonl")))
    largest = max(chain(end_token_ids, [tokenizer.pad_token_id], of_documents, *map(_ids_of, rows)))
    if largest >= size:
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"The tokenizer gives {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest:,}, but the model has "
            f"embeddings for the ids 0 to {size - 1:,} only. Resize the model's embeddings and save it again, or use "
            "the tokenizer and the template that belong to the model.",
            "model",
        )


def _ids_of(row: EvaluationRow) -> Iterator[int]:
    yield from chain(row.prompt_ids, row.ids, row.few_shot_prompt_ids or (), *(row.candidate_ids or ()))
