"""Near-duplicates are found by what they say, not by how they are written."""

import numpy as np
import pytest

from finetune_trainer.prepare.near_duplicates import clusters, joined, keep_together, signature

SENTENCE = (
    "the committee met on tuesday to discuss the budget for the coming year and decided that the "
    "library should stay open until nine in the evening although nobody had asked for it"
)


def cluster(*texts: str) -> list[int]:
    return clusters(np.stack([signature(text) for text in texts])).tolist()


def jaccard(first: str, second: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def test_case_spacing_and_punctuation_make_no_difference() -> None:
    assert cluster("What a  day!", "what, a day", "What a night") == [0, 0, 2]


def test_a_changed_word_at_the_end_is_found_and_another_text_is_not() -> None:
    changed = SENTENCE.replace(" it", " them")
    assert jaccard(SENTENCE, changed) > 0.9
    other = "a completely different text about ships and the sea that has about the same length as the first one"
    assert cluster(SENTENCE, other, changed) == [0, 1, 0]


def test_the_signatures_estimate_the_jaccard_similarity() -> None:
    errors = []
    for number, shared in enumerate(range(10, 400, 6)):
        words = [f"{number}w{i}" for i in range(400)]
        first, second = " ".join(words), " ".join([*words[:shared], *(f"x{i}" for i in range(400 - shared))])
        estimate = float((signature(first) == signature(second)).mean())
        errors.append(estimate - jaccard(first, second))
    assert abs(np.mean(errors)) < 0.02
    assert max(map(abs, errors)) < 0.25


def test_texts_that_only_share_a_few_words_are_apart() -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(0, 300, 25)) for _ in range(400)]
    assert len(set(cluster(*texts))) == 400


def test_a_cluster_above_one_percent_is_reported_and_its_rows_stand_alone() -> None:
    together, large = keep_together(np.array([*[0] * 12, *range(12, 300), 299]))
    assert large == [12]
    assert together[:12].tolist() == list(range(12))
    assert together[-1] == together[-2]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0, 1, 2, 3], ["x", "x", "y", "z"], [0, 0, 2, 3]), ([0, 0, 2, 3], ["x", "y", "y", "z"], [0, 0, 0, 3])],
)
def test_groups_and_near_duplicates_are_joined(first: list[int], second: list[str], expected: list[int]) -> None:
    assert joined(np.array(first), second).tolist() == expected


def test_no_rows_make_no_clusters() -> None:
    assert clusters(np.empty((0, 64), np.uint32)).tolist() == []
