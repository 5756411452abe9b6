"""What a result must stand beside: the majority label, and TF-IDF with logistic regression on the same rows."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

from finetune_trainer.data.evaluation_rows import BaselineRow, EvaluationRow
from finetune_trainer.data.words import words
from finetune_trainer.evaluate.metrics import Answer

MAJORITY = "majority"
TFIDF = "tfidf-logreg"
TFIDF_ALL = "tfidf-logreg-all"
FEW_SHOT = "few-shot"

WORDS: dict[str, str] = {
    MAJORITY: "Always the most frequent label of the training rows",
    TFIDF: "TF-IDF + logistic regression, fitted on the same training rows",
    TFIDF_ALL: "TF-IDF + logistic regression, fitted on all rows that are not held out",
    FEW_SHOT: "Base model with solved examples in the prompt",
}


def classification_baselines(training: Sequence[BaselineRow], rows: Sequence[EvaluationRow]) -> dict[str, list[Answer]]:
    """Answers of each baseline to the held-out rows. Fitted on `training`, in which no held-out row may be.

    `tfidf-logreg-all` is there only if rows were left out of the training.
    """
    used = [row for row in training if row.used]
    if not used or not rows:
        return {}
    majority = Counter(row.label for row in used).most_common(1)[0][0]
    predictions = {MAJORITY: [majority] * len(rows)}
    texts = [row.text for row in rows]
    for name, fitted_on in ((TFIDF, used), (TFIDF_ALL, list(training))):
        if name == TFIDF_ALL and len(training) == len(used):
            continue
        predicted = _tfidf(fitted_on, texts)
        if predicted is not None:
            predictions[name] = predicted
    return {
        name: [_answer(p, row) for p, row in zip(labels, rows, strict=True)] for name, labels in predictions.items()
    }


def _terms(text: str) -> list[str]:
    """As scikit-learn's own, without single letters, but for scripts in which a character counts as a word."""
    return [word for word in words(text) if len(word) > 1 or not word.isascii()]


def _tfidf(training: Sequence[BaselineRow], texts: Sequence[str]) -> list[str] | None:
    """Word uni- and bigrams, logistic regression with scikit-learn's defaults; None where nothing can be fitted.

    Where words are not separated, these are uni- and bigrams of characters.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labels = [row.label for row in training]
    if len(set(labels)) < 2:
        return None
    pipeline = make_pipeline(
        TfidfVectorizer(tokenizer=_terms, token_pattern=None, ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(max_iter=1000),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pipeline.fit([row.text for row in training], labels)
    except ValueError:  # no word in any text
        return None
    return [str(label) for label in pipeline.predict(list(texts))]


def _answer(label: str, row: EvaluationRow) -> Answer:
    candidates = row.candidates or []
    return Answer(text=label, choice=candidates.index(label) if label in candidates else None)
