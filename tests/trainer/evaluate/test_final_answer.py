"""What is scored of a generated answer, under templates that behave like those of well-known models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny import CHATML, tiny_tokenizer

from finetune_trainer.evaluate.final_answer import AnswerReader, FinalAnswer

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
EMPTY_THOUGHT = (
    TURNS
    + "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    + "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}"
    + END
    + ASK
)
OPENED_THOUGHT = (
    TURNS
    + "{% if m.role == 'assistant' %}{{ '<think>\n</think>\n\n' }}{% endif %}{{ m.content }}"
    + END
    + ASK.replace("assistant\n", "assistant\n<think>\n")
)
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content }}{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
RESPONSE = (
    TURNS
    + "{% if m.role == 'assistant' %}{{ '<|START_THINKING|><|END_THINKING|><response>' + m.content + '</response>' }}"
    + "{% else %}{{ m.content }}{% endif %}"
    + END
    + ASK
)
LED = TURNS + "{% if m.role == 'assistant' %}{{ 'Answer: ' }}{% endif %}{{ m.content }}" + END + ASK
CONTROL = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"]


def tokenizer_with(template: str, directory: Path, tokens: list[str] | None = None) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_tokenizer(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.add_tokens(tokens or [])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "said", "answer", "thought"),
    [
        (CHATML, " in Bern\n", "in Bern", "none"),
        (CHATML, "<think>a</think>b", "<think>a</think>b", "none"),
        (CHATML, "in<|endoftext|> Bern", "in Bern", "none"),
        (EMPTY_THOUGHT, "<think>\n\n</think>\n\nin Bern", "in Bern", "none"),
        (EMPTY_THOUGHT, "in Bern", "in Bern", "none"),
        (EMPTY_THOUGHT, "<think>\nIt was in Basel. No.\n</think>\n\nin Bern", "in Bern", "finished"),
        (EMPTY_THOUGHT, "It was in Basel.\n</think>\nin Bern", "in Bern", "finished"),
        (EMPTY_THOUGHT, "<think>\nIt was in Basel. No", "", "unfinished"),
        (OPENED_THOUGHT, "</think>\n\nin Bern", "in Bern", "none"),
        (OPENED_THOUGHT, "It was in Basel. No.\n</think>\n\nin Bern", "in Bern", "finished"),
        (CHANNELS, "<|channel|>final<|message|>in Bern", "in Bern", "none"),
        (
            CHANNELS,
            "<|channel|>analysis<|message|>Basel?<|end|><|start|>assistant<|channel|>final<|message|>in Bern",
            "in Bern",
            "finished",
        ),
        (CHANNELS, "<|channel|>analysis<|message|>Basel? No, final is", "", "unfinished"),
        (CHANNELS, "in Bern", "in Bern", "none"),
        (RESPONSE, "<|START_THINKING|><|END_THINKING|><response>in Bern</response>", "in Bern", "none"),
        (RESPONSE, "<|START_THINKING|>Basel?<|END_THINKING|><response>in Bern</response>", "in Bern", "finished"),
        (LED, "Answer: in Bern", "in Bern", "none"),
        (LED, "in Bern. Answer: no", "in Bern. Answer: no", "none"),
    ],
)
def test_only_the_answer_is_scored(tmp_path: Path, template: str, said: str, answer: str, thought: Any) -> None:
    tokenizer = tokenizer_with(template, tmp_path)
    ids = tokenizer(said, add_special_tokens=False).input_ids
    assert AnswerReader(tokenizer).read(ids, ended=False) == FinalAnswer(answer, thought)


def test_a_prompt_that_opens_a_thought_does_not_force_one(tmp_path: Path) -> None:
    reader = AnswerReader(tokenizer_with(OPENED_THOUGHT, tmp_path))
    ids = reader.chat.tokenizer("in Bern").input_ids
    assert reader.read(ids, ended=True) == FinalAnswer("in Bern")
    assert reader.read(ids, ended=False) == FinalAnswer("", "unfinished")


@pytest.mark.parametrize("template", [CHATML, EMPTY_THOUGHT, OPENED_THOUGHT, CHANNELS, RESPONSE, LED])
@pytest.mark.parametrize("answer", ["in Bern", "42", "政府。", "a: b, <c>"])
def test_what_is_learnt_as_an_answer_is_read_as_that_answer(tmp_path: Path, template: str, answer: str) -> None:
    reader = AnswerReader(tokenizer_with(template, tmp_path))
    *ids, end = reader.chat.answer_ids(answer)
    assert end in reader.chat.end_token_ids
    assert reader.read(ids, ended=True) == FinalAnswer(answer)


def test_marks_that_only_the_vocabulary_knows_are_those_of_thoughts(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML, tmp_path, ["<think>", "</think>"])
    ids = tokenizer("<think>Basel?</think>in Bern").input_ids
    assert AnswerReader(tokenizer).read(ids, ended=True) == FinalAnswer("in Bern", "finished")


def test_references_are_compared_without_their_thoughts(tmp_path: Path) -> None:
    knows, plain = (AnswerReader(tokenizer_with(t, tmp_path)) for t in (EMPTY_THOUGHT, CHATML))
    assert knows.reference("<think>\nTwice 7.\n</think>\n\n14") == "14"
    assert knows.reference("14") == "14"
    assert plain.reference("<think>Twice 7.</think>14") == "<think>Twice 7.</think>14"
