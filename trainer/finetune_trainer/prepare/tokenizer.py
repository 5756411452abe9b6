"""The tokenizer with the chat template and pad token that a job uses, and what was chosen about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_api.report import FailureClass
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import RunContext
from finetune_trainer.data.chat import ChatFormat, ChatTemplateError, choose_pad, with_plain_template
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import gguf
from finetune_trainer.prepare.models import LocalModel


def open_chat(context: RunContext, spec: FineTuneJobSpec, local: LocalModel) -> tuple[Any, ChatFormat]:
    """The tokenizer with the template and pad token that this job uses, everywhere and in the export.

    Raises TrainerError (bad-spec) where the template cannot be used or nothing can pad.
    """
    tokenizer = load_tokenizer(local.directory, trust_remote_code=spec.model.trust_remote_code)
    if spec.model.chat_template is not None:
        tokenizer.chat_template = spec.model.chat_template
        context.reporter.choose("chatTemplate", "model.chatTemplate", "set in the spec")
    elif with_plain_template(tokenizer):
        context.reporter.choose("chatTemplate", "plain", "the tokenizer has no chat template")
        context.reporter.warn(
            "The tokenizer has no chat template, so a plain one (`User:`, `Assistant:`) is used and exported with the "
            "model. Set model.chatTemplate to use another."
        )
    try:
        chat = ChatFormat(tokenizer)
    except ChatTemplateError as error:
        sentence = f"{str(error)[:1].upper()}{str(error)[1:]}."
        raise TrainerError(FailureClass.BAD_SPEC, sentence, "model.chatTemplate") from error
    pad = choose_pad(tokenizer, chat.end_token_ids)
    if pad is None:
        raise TrainerError(
            FailureClass.BAD_SPEC,
            "The tokenizer has no token to pad with: all of its special tokens end answers. Set pad_token in its "
            "tokenizer_config.json to a token that no text uses.",
            "model",
        )
    tokenizer.pad_token = pad.token
    context.reporter.choose("padToken", pad.token, pad.why)
    if chat.implicit_system:
        context.reporter.choose("systemPrompt", chat.implicit_system, "added by the chat template where a row has none")
    if not chat.keeps_history:
        context.reporter.choose(
            "chatDocuments",
            "one per turn",
            "the chat template rewrites earlier turns, so each answer is an example of its own",
        )
    if not chat.end_text:
        context.reporter.warn(
            "The chat template writes no token after an answer. The tokenizer's end token is appended, "
            "so that the model learns to stop."
        )
    if local.converted:
        context.reporter.choose("conversion", gguf.DTYPE, gguf.WHY_BFLOAT16)
    return tokenizer, chat


def load_tokenizer(place: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or a GGUF file. Raises TrainerError (bad-spec) where there is none."""
    from transformers import AutoTokenizer

    if place.is_file():
        return gguf.load_tokenizer(place)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # of no narrower class where `tokenizers` cannot read a file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sentence = f"The model's tokenizer cannot be read: {reason[:400]}"
        raise TrainerError(FailureClass.BAD_SPEC, sentence, "model") from error


def document_limit(context: RunContext, spec: FineTuneJobSpec, config: Any) -> int:
    """Tokens of a document at most: `maxSequenceLength`, within the model's context less the virtual tokens."""
    asked = spec.training.max_sequence_length
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 0)
    room = longest - spec.tuning.virtual_tokens if longest else asked
    if asked > room:
        context.reporter.warn(
            f"training.maxSequenceLength {asked:,} does not fit into the model's context; {room:,} is used."
        )
    return min(asked, room)
