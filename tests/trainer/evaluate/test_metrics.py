"""Every metric against a published implementation."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.spec import Evaluation
from finetune_api.traits import Task
from finetune_trainer.data.evaluation_rows import BaselineRow, EvaluationRow
from finetune_trainer.data.words import words
from finetune_trainer.evaluate.baselines import TFIDF, classification_baselines
from finetune_trainer.evaluate.metrics import EXTRA, Answer, exact_match, measure, metrics_of, normalised, token_f1

LABELS = ["a", "b", "c", "never"]
SENTENCES = [
    "The cat sat on the mat.",
    "cat sat",
    "A dog, the dog!",
    "",
    "it's 3.5 o'clock",
    "mats sitting",
    "the a an",
]


def classified(pairs: list[tuple[int, int]]) -> tuple[list[EvaluationRow], list[Answer]]:
    rows = [EvaluationRow("r", "d", "classification", candidates=LABELS, gold=gold) for gold, _ in pairs]
    return rows, [Answer(text=LABELS[said], choice=said) for _, said in pairs]


def answered(pairs: list[tuple[list[str], str]]) -> tuple[list[EvaluationRow], list[Answer]]:
    rows = [EvaluationRow("r", "d", "question-answering", answers=references) for references, _ in pairs]
    return rows, [Answer(text=text) for _, text in pairs]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_accuracy_and_macro_f1_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    gold, said = zip(*pairs, strict=True)
    assert measure("accuracy", *classified(pairs)).value == pytest.approx(accuracy_score(gold, said))
    assert measure("macro-f1", *classified(pairs)).value == pytest.approx(f1_score(gold, said, average="macro"))


def test_a_baseline_that_names_an_unknown_label_is_wrong_and_nothing_else() -> None:
    rows, answers = classified([(0, 0), (1, 1)])
    answers[1] = Answer(text="unheard of")
    assert measure("accuracy", rows, answers).value == 0.5
    assert measure("macro-f1", rows, answers).value == pytest.approx(0.5)


references = st.lists(st.sampled_from([s for s in SENTENCES if normalised(s)]), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(references, st.sampled_from(SENTENCES)), min_size=1))
def test_exact_match_and_f1_are_squads(pairs: list[tuple[list[str], str]]) -> None:
    from torchmetrics.text import SQuAD

    published = SQuAD()
    published.update(
        [{"id": str(i), "prediction_text": said} for i, (_, said) in enumerate(pairs)],
        [{"id": str(i), "answers": {"text": r, "answer_start": [0] * len(r)}} for i, (r, _) in enumerate(pairs)],
    )
    expected = {name: float(value) / 100 for name, value in published.compute().items()}
    assert measure("exact-match", *answered(pairs)).value == pytest.approx(expected["exact_match"], abs=1e-6)
    assert measure("f1", *answered(pairs)).value == pytest.approx(expected["f1"], abs=1e-6)


def test_nothing_is_right_where_nothing_is_the_answer_as_in_squad_2() -> None:
    assert measure("f1", *answered([(["the"], "A.")])).value == 1
    assert measure("f1", *answered([(["the"], "cat")])).value == 0


def test_articles_case_and_punctuation_do_not_count() -> None:
    assert exact_match("The  Eiffel-Tower!", "eiffeltower") == 1
    assert exact_match("tower", "eiffel tower") == 0


def test_rouge_is_rouge_scores_best_reference() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    source = random.Random(0)
    words = ["the", "cat", "sits", "sitting", "on", "mats", "mat", "dog", "runs", "running"]

    def text() -> str:
        return " ".join(source.choices(words, k=source.randrange(1, 9)))

    pairs = [([text() for _ in range(2)], text()) for _ in range(30)]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for ours, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        expected = np.mean([scorer.score_multi(refs, said)[theirs].fmeasure for refs, said in pairs])
        assert measure(ours, *answered(pairs)).value == pytest.approx(expected)


def test_bleu_is_sacrebleus_corpus_bleu() -> None:
    from sacrebleu.metrics.bleu import BLEU

    source = random.Random(1)
    words = ["the", "cat", "sat", "on", "a", "mat", "with", "its", "small", "dog"]

    def text() -> str:
        return " ".join(source.choices(words, k=source.randrange(4, 14)))

    pairs = [([text(), text()], text()) for _ in range(60)]
    said = [text for _, text in pairs]
    streams = [[refs[n] for refs, _ in pairs] for n in range(2)]
    assert measure("bleu", *answered(pairs)).value == pytest.approx(BLEU().corpus_score(said, streams).score)


SCRIPTS = {
    "Arabic": "أعلنت الحكومة اليوم عن خطة، لحماية البيئة؟",
    "Chinese": "政府今天宣布了环保计划，包括三项措施。",
    "Cyrillic": "Правительство объявило «план» защиты природы — сегодня.",
    "Devanagari": "सरकार ने आज पर्यावरण योजना की घोषणा की।",
    "Ethiopic": "መንግሥት፡ዛሬ፡ዕቅድ፡አወጀ።",
    "German": "Bürger übten größere Zurückhaltung, „heute“.",
    "Greek": "Η κυβέρνηση ανακοίνωσε σχέδιο· σήμερα.",
    "Hebrew": "הממשלה הודיעה היום על תוכנית.",
    "Japanese": "政府はラーメンの計画を、今日発表した。々",
    "Khmer": "រដ្ឋាភិបាលបានប្រកាសផែនការ។",
    "Korean": "정부는 오늘 환경 계획을 발표했다.",
    "Myanmar": "အစိုးရက ဒီနေ့ အစီအစဉ်ကို ကြေညာခဲ့သည်။",
    "Tamil": "அரசு இன்று திட்டத்தை அறிவித்தது.",
    "Thai": "รัฐบาลประกาศแผนสิ่งแวดล้อมวันนี้",
    "Tibetan": "གཞུང་གིས་དེ་རིང་འཆར་གཞི་བསྒྲགས།",
    "Turkish": "İstanbul sokaklarında ıssız bir gün, çağrı yapıldı.",
}
OF_WORDS = ("f1", "rouge-1", "rouge-2", "rouge-l")
FREE = (*OF_WORDS, "exact-match", "bleu")
texts = st.one_of(
    st.text(max_size=20),
    *(st.text(st.sampled_from(sorted(set(text))), max_size=20) for text in SCRIPTS.values()),
)


def scores(reference: str, said: str) -> dict[str, float]:
    """The scores of one answer as shares."""
    values = {name: measure(name, *answered([([reference], said)])).value for name in FREE}
    return values | {"bleu": values["bleu"] / 100}


@settings(deadline=None, max_examples=300)
@given(texts)
def test_an_answer_equal_to_the_reference_scores_1_in_every_script(text: str) -> None:
    expected = 1.0 if text.split() else 0.0  # sacrebleu gives 0 where there is nothing
    assert scores(text, text) == pytest.approx(dict.fromkeys(FREE, 1.0) | {"bleu": expected})


@settings(deadline=None, max_examples=200)
@given(texts, texts)
def test_scores_of_words_are_symmetric_and_shares(one: str, other: str) -> None:
    there, back = scores(one, other), scores(other, one)
    for name in (*OF_WORDS, "exact-match"):
        assert there[name] == pytest.approx(back[name])
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in there.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_half_of_a_text_is_partly_right_in_every_script(script: str) -> None:
    text = SCRIPTS[script]
    half = text[: len(text) // 2]
    found = scores(text, half)
    assert all(0.35 < found[name] < 0.85 for name in ("f1", "rouge-1", "rouge-l")), found
    assert found["exact-match"] == 0


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(max_codepoint=127), max_size=30), st.text(st.characters(max_codepoint=127), max_size=30))
def test_ascii_texts_are_scored_as_the_packages_do(one: str, other: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    found = scores(one, other)
    published = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(one, other)
    for ours, theirs, least in (("rouge-1", "rouge1", 1), ("rouge-2", "rouge2", 2), ("rouge-l", "rougeL", 1)):
        if max(len(words(one)), len(words(other))) >= least:
            assert found[ours] == pytest.approx(published[theirs].fmeasure)
    assert found["bleu"] == pytest.approx(BLEU(effective_order=True).corpus_score([other], [[one]]).score / 100)


@pytest.mark.parametrize(
    ("reference", "said", "f1"),
    [
        ("政府宣布了环保计划", "政府宣布环保计划", 16 / 17),
        ("北京大学", "北京 大学", 1),
        ("是", "是。", 1),
        ("iPhone手机", "iphone 手機", 2 / 3),
        ("３．５万", "3.5万", 1),
        ("Straße", "STRASSE", 1),
        ("Λόγος", "ΛΌΓΟΣ", 1),
        ("it’s", "it's", 1),
        ("Eiffel–Tower", "Eiffel-Tower", 1),
        ("«Москва»", "москва", 1),
        ("café", "cafe\u0301", 1),
        ("می‌خواهم", "میخواهم", 1),
        ("हिन्दी।", "हिन्दी", 1),
        ("سؤال؟", "سؤال", 1),
        ("😀", "😢", 0),
    ],
)
def test_what_counts_as_the_same_word_does_not_depend_on_the_script(reference: str, said: str, f1: float) -> None:
    assert token_f1(said, reference) == pytest.approx(f1)
    assert exact_match(said, reference) == (f1 == 1)


def test_umlauts_do_not_break_words_of_rouge() -> None:
    assert scores("Bürger", "B")["rouge-1"] == 0
    assert scores("über Bürger", "Bürger")["rouge-1"] == pytest.approx(2 / 3)


def test_perplexity_and_loss_are_the_published_ones() -> None:
    from torchmetrics.text import Perplexity

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    targets[1, 4:] = -100
    published = Perplexity(ignore_index=-100)
    published.update(logits, targets)
    answers = []
    for row in range(3):
        kept = targets[row] != -100
        log_probabilities = logits[row].log_softmax(-1)[kept, targets[row][kept]]
        answers.append(Answer(nll=-float(log_probabilities.sum()), tokens=int(kept.sum())))
    rows = [EvaluationRow("r", "d", "text", ids=[1]) for _ in answers]
    assert measure("perplexity", rows, answers).value == pytest.approx(float(published.compute()), rel=1e-5)
    assert measure("neg-loss", rows, answers).value == pytest.approx(-math.log(float(published.compute())), rel=1e-5)


def test_accuracy_of_likelihood_tasks_is_that_of_tokens() -> None:
    rows = [EvaluationRow("r", "d", "text", ids=[1]) for _ in range(2)]
    answers = [Answer(tokens=3, right_tokens=3), Answer(tokens=5, right_tokens=1)]
    assert measure("accuracy", rows, answers).value == 0.5


def test_metrics_that_are_asked_for_come_after_the_tasks_own_and_only_where_they_can_be_measured() -> None:
    field: Any = Evaluation.model_fields["metrics"].annotation
    assert set(field.__args__[0].__args__) == set(EXTRA)
    assert metrics_of(Task.CLASSIFICATION, ["rouge", "perplexity", "accuracy"]) == [
        "accuracy",
        "macro-f1",
        "perplexity",
    ]
    assert metrics_of(Task.QUESTION_ANSWERING, ["rouge"]) == ["f1", "exact-match", "rouge-l", "rouge-1", "rouge-2"]


def test_words_are_separated_as_their_script_does() -> None:
    assert words("Die Bürger’s 3.5 Äpfel™") == ["die", "bürger", "s", "3", "5", "äpfel"]
    assert words("iPhone手机，很好") == ["iphone", "手", "机", "很", "好"]
    assert words("ไทย ๑๒") == ["ไ", "ท", "ย", "๑๒"]
    assert words("བོད་ཡིག 한국어 조사") == ["བོད", "ཡིག", "한국어", "조사"]
    assert words("…!?") == []


@pytest.mark.parametrize(("good", "bad"), [("好", "坏"), ("ดี", "แย่"), ("good", "bad")])
def test_the_tfidf_baseline_learns_from_texts_without_spaces(good: str, bad: str) -> None:
    space = " " if good.isascii() else ""
    filler = ["我今天", "他昨天", "车辆", "房屋"] if not space else ["I", "today", "car", "house"]

    def sentence(mood: str, number: int) -> str:
        return space.join([filler[number % 4], filler[number // 4 % 4], mood, filler[number // 16 % 4]])

    training = [BaselineRow(sentence(mood, n), mood, used=True) for n in range(40) for mood in (good, bad)]
    rows = [
        EvaluationRow("r", "d", "classification", candidates=[good, bad], gold=gold, text=sentence(mood, n))
        for n in range(40, 60)
        for gold, mood in enumerate((good, bad))
    ]
    found = classification_baselines(training, rows)[TFIDF]
    assert [answer.choice for answer in found] == [row.gold for row in rows]
