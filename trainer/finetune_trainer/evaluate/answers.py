"""One model's answers to held-out rows: closed ones by likelihood, free ones by generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.evaluate.final_answer import AnswerReader
from finetune_trainer.evaluate.generation import greedy_answers
from finetune_trainer.evaluate.likelihood import (
    Budget,
    ClosedQuestion,
    TargetSequence,
    plain_scores,
    sequence_scores,
    tree_scores,
)
from finetune_trainer.evaluate.metrics import Answer

RowsDone = Callable[[int], None]


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are computed; nothing here changes what they are."""

    max_new_tokens: int
    budget: Budget
    trees: bool = True
    """Score closed answers as trees; off for models that take no masks of their own."""


def closed(row: EvaluationRow, *, few_shot: bool = False) -> ClosedQuestion:
    """The row's prompt and candidates; with `few_shot` the prompt after solved examples."""
    prompt = row.few_shot_prompt_ids if few_shot and row.few_shot_prompt_ids else row.prompt_ids
    return ClosedQuestion(tuple(prompt), tuple(tuple(ids) for ids in row.candidate_ids or ()))


def answer_rows(
    model: Any,
    reader: AnswerReader,
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    *,
    few_shot: bool = False,
    done: RowsDone = lambda _rows: None,
) -> list[Answer]:
    """Answers to the rows of one dataset, in their order."""
    if not rows:
        return []
    if rows[0].candidate_ids:
        return _closed_answers(model, rows, settings, few_shot, done)
    if rows[0].ids:
        return _document_answers(model, rows, settings, done)
    prompts = [row.few_shot_prompt_ids if few_shot and row.few_shot_prompt_ids else row.prompt_ids for row in rows]
    answers = greedy_answers(
        model,
        reader,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        tokens_per_batch=4 * settings.budget.tokens,
        done=done,
    )
    return [Answer(text=answer.text, thought=answer.thought) for answer in answers]


def _closed_answers(
    model: Any, rows: Sequence[EvaluationRow], settings: AnswerSettings, few_shot: bool, done: RowsDone
) -> list[Answer]:
    score = tree_scores if settings.trees else plain_scores
    questions = [closed(row, few_shot=few_shot) for row in rows]
    answers = []
    for row, scores in zip(rows, score(model, questions, settings.budget, done), strict=True):
        # A score that is not a number never wins; the first of equal scores does.
        choice = max(range(len(scores)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
        gold = row.gold or 0
        answers.append(
            Answer(
                text=(row.candidates or [])[choice],
                choice=choice,
                scores=tuple(scores),
                nll=-scores[gold],
                tokens=len((row.candidate_ids or [])[gold]),
            )
        )
    return answers


def _document_answers(
    model: Any, rows: Sequence[EvaluationRow], settings: AnswerSettings, done: RowsDone
) -> list[Answer]:
    sequences = [TargetSequence(tuple(r.ids), tuple(r.target_position), tuple(r.target_id)) for r in rows]
    scored = sequence_scores(model, sequences, settings.budget, done)
    return [Answer(nll=-s.sum, tokens=len(s.log_probabilities), right_tokens=s.right) for s in scored]
