"""Metrics as sums over rows: what each adds up, and what is made of the sums.

Point values and intervals come from the same numbers, so they can never disagree. The word-level work is done by
rouge-score and sacrebleu; exact match and F1 follow SQuAD's definition. All three agree on what a word is outside the
Latin script (`data/words.py`); for ASCII texts their values are those of the packages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from finetune_api.traits import Scoring, Task
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.data.words import fold, spaced, words
from finetune_trainer.evaluate.final_answer import Thought

Float64 = npt.NDArray[np.float64]

EXTRA: dict[str, tuple[tuple[str, ...], frozenset[Scoring]]] = {
    "accuracy": (("accuracy",), frozenset({Scoring.CANDIDATES, Scoring.LIKELIHOOD})),
    "macro-f1": (("macro-f1",), frozenset({Scoring.CANDIDATES})),
    "exact-match": (("exact-match",), frozenset({Scoring.GENERATION})),
    "f1": (("f1",), frozenset({Scoring.GENERATION})),
    "rouge": (("rouge-l", "rouge-1", "rouge-2"), frozenset({Scoring.GENERATION})),
    "bleu": (("bleu",), frozenset({Scoring.GENERATION})),
    "perplexity": (("perplexity",), frozenset({Scoring.CANDIDATES, Scoring.LIKELIHOOD})),
}
"""`evaluation.metrics`: what each asks for, and how rows are scored that it can be measured on."""

LOWER_IS_BETTER = frozenset({"perplexity"})
PERCENT = frozenset({"accuracy", "macro-f1", "f1", "exact-match", "rouge-l", "rouge-1", "rouge-2"})
"""Metrics between 0 and 1, shown as percentages."""


@dataclass(frozen=True)
class Answer:
    """What one model said to one row."""

    text: str = ""
    """The chosen candidate, or the generated answer."""
    choice: int | None = None
    """Index of the candidate with the highest score."""
    scores: tuple[float, ...] = ()
    """Summed log-probability of each candidate, end token included."""
    nll: float = 0.0
    """Negative log-likelihood of the reference, in nats."""
    tokens: int = 0
    """Tokens of the reference that `nll` is summed over."""
    right_tokens: int = 0
    """How many of these were the most probable token (likelihood tasks only)."""
    thought: Thought = "none"
    """Whether the model thought before a generated answer."""


@dataclass(frozen=True)
class Measure:
    """One metric of one model on one dataset.

    statistics: float64[rows, k], added up over rows; finish: float64[..., k] of sums to float64[...] of values.
    """

    name: str
    statistics: Float64
    finish: Callable[[Float64], Float64]

    @property
    def value(self) -> float:
        """The metric over all rows."""
        return float(self.finish(self.statistics.sum(axis=0)))


def metrics_of(task: Task, asked: Sequence[str]) -> list[str]:
    """Names of the metrics of a dataset: the task's own, the primary one first, then what was asked for."""
    names = list(task.traits.metrics)
    for extra in asked:
        given, scorings = EXTRA[extra]
        names += [name for name in given if task.traits.scoring in scorings and name not in names]
    return names


def measure(name: str, rows: Sequence[EvaluationRow], answers: Sequence[Answer]) -> Measure:
    """The metric of that name of one model's answers to these rows."""
    if name == "macro-f1":
        return _macro_f1(rows, answers)
    if name == "bleu":
        return _bleu(rows, answers)
    if name in ("neg-loss", "perplexity"):
        sums = np.array([(answer.nll, answer.tokens) for answer in answers], dtype=np.float64)
        return Measure(name, sums, _neg_loss if name == "neg-loss" else _perplexity)
    if name == "accuracy" and rows and not rows[0].candidates:
        sums = np.array([(answer.right_tokens, answer.tokens) for answer in answers], dtype=np.float64)
        return Measure(name, sums, _ratio)
    values = [row_score(name, row, answer) for row, answer in zip(rows, answers, strict=True)]
    return Measure(name, np.column_stack([values, np.ones(len(values))]).astype(np.float64), _ratio)


def row_score(name: str, row: EvaluationRow, answer: Answer) -> float:
    """What one row adds to a metric that is a mean over rows; for likelihood tasks the row's own −loss."""
    if name == "accuracy":
        return float(answer.choice == row.gold)
    if name == "exact-match":
        return max((exact_match(answer.text, reference) for reference in row.answers), default=0.0)
    if name == "f1":
        return max((token_f1(answer.text, reference) for reference in row.answers), default=0.0)
    if name.startswith("rouge-"):
        return max((rouge(name, answer.text, reference) for reference in row.answers), default=0.0)
    if name == "neg-loss":
        return -answer.nll / max(1, answer.tokens)
    raise ValueError(f"{name} is not a mean over rows")


def _ratio(sums: Float64) -> Float64:
    result: Float64 = sums[..., 0] / np.maximum(sums[..., 1], 1.0)
    return result


def _neg_loss(sums: Float64) -> Float64:
    return -_ratio(sums)


def _perplexity(sums: Float64) -> Float64:
    result: Float64 = np.exp(np.minimum(_ratio(sums), 700.0))
    return result


# -- classification ---------------------------------------------------------------------------------------------


def _macro_f1(rows: Sequence[EvaluationRow], answers: Sequence[Answer]) -> Measure:
    gold = np.array([row.gold for row in rows])
    chosen = np.array([-1 if answer.choice is None else answer.choice for answer in answers])
    classes = max(len(row.candidates or ()) for row in rows)
    one_hot = np.vstack([np.eye(classes), np.zeros(classes)])  # no choice, -1, is the line of zeros
    hits = one_hot[gold] * (gold == chosen)[:, None]
    return Measure("macro-f1", np.hstack([hits, one_hot[chosen], one_hot[gold]]), _mean_f1)


def _mean_f1(sums: Float64) -> Float64:
    """Mean over the classes that occur in gold or predictions, as scikit-learn's `f1_score(average="macro")`."""
    hits, chosen, gold = np.split(sums, 3, axis=-1)
    occurs = (chosen + gold) > 0
    f1 = np.where(occurs, 2 * hits / np.maximum(chosen + gold, 1.0), 0.0)
    result: Float64 = f1.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)
    return result


# -- free answers -----------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")
_WORD_SEPARATORS = str.maketrans("\u0f0b\u1361", "  ")
"""Marks that Tibetan and Ethiopic write instead of spaces."""


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces (arXiv:1606.05250)."""
    plain = _PUNCTUATION.sub("", fold(text).translate(_WORD_SEPARATORS))
    return " ".join(spaced(_ARTICLES.sub(" ", plain)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same in normal form."""
    return float(normalised(answer) == normalised(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 over the bags of words in normal form; 1 where both are empty."""
    said, wanted = normalised(answer).split(), normalised(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


class _RougeWords:
    """rouge-score's own tokenizer for ASCII words, with Porter stemming; other words as they are."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return list(self._english.tokenize(text))
        return [stem for word in words(text) for stem in (self._english.tokenize(word) if word.isascii() else [word])]


@cache
def _rouge_scorer(kind: str) -> Any:
    """rouge-score brings nltk, which takes seconds to import: only where it is needed."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_RougeWords())


def rouge(name: str, answer: str, reference: str) -> float:
    """F-measure of ROUGE-1, -2 or -L by rouge-score; the exact match of texts too short for it to count anything."""
    if max(len(words(answer)), len(words(reference))) < (2 if name == "rouge-2" else 1):
        return exact_match(answer, reference)
    kind = name.replace("-", "").replace("l", "L")
    return float(_rouge_scorer(kind).score(reference, answer)[kind].fmeasure)


_BLEU_ORDER = 4


def _bleu(rows: Sequence[EvaluationRow], answers: Sequence[Answer]) -> Measure:
    """Corpus BLEU (sacrebleu's defaults: 13a, exponential smoothing), from 0 to 100.

    Scripts without spaces between words are split into characters first, as sacrebleu's `zh` does for Chinese.
    """
    from sacrebleu.metrics.bleu import BLEU

    sentence = BLEU(effective_order=True)
    scores = [
        sentence.sentence_score(spaced(answer.text), [spaced(text) for text in row.answers or [""]])
        for row, answer in zip(rows, answers, strict=True)
    ]
    sums = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=np.float64)
    return Measure("bleu", sums.reshape(len(rows), 2 * _BLEU_ORDER + 2), _corpus_bleu)


def _corpus_bleu(sums: Float64) -> Float64:
    from sacrebleu.metrics.bleu import BLEU

    flat = sums.reshape(-1, sums.shape[-1])
    values = [
        BLEU.compute_bleu(
            correct=[int(n) for n in row[:_BLEU_ORDER]],
            total=[int(n) for n in row[_BLEU_ORDER : 2 * _BLEU_ORDER]],
            sys_len=int(row[-2]),
            ref_len=int(row[-1]),
            smooth_method="exp",
            effective_order=True,  # answers that are all shorter than four words still have a score
        ).score
        for row in flat
    ]
    return np.array(values).reshape(sums.shape[:-1])
