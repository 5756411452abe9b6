"""Near-duplicates are found by what they say, not by how they are written."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare import near_duplicates
from finetune_trainer.prepare.near_duplicates import (
    SignatureFile,
    clusters,
    joined,
    keep_together,
    normalise,
    signatures,
)

SENTENCE = (
    "the committee met on tuesday to discuss the budget for the coming year and decided that the "
    "library should stay open until nine in the evening although nobody had asked for it"
)


def cluster(*texts: str) -> list[int]:
    return clusters(signatures(texts)).tolist()


def jaccard(first: str, second: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def test_case_spacing_and_punctuation_make_no_difference() -> None:
    assert cluster("What a  day!", "what, a day", "What a night") == [0, 0, 2]


@pytest.mark.parametrize(
    "texts",
    [
        ("\U0001f389\U0001f389", "\U0001f621", "\U0001f389"),
        ("great \U0001f389", "great \U0001f621", "great"),
        ("!!!", "???", "..."),
        ("What is 12 - 7?", "What is 12 + 7?", "What is 12 / 7?", "What is 12 * 7?", "What is 12 7?"),
        ("C", "C++", "C#"),
        ("\u20ac5", "$5", "5"),
        ("\u0915\u0941", "\u0915\u093f", "\u0915"),
        tuple(f"I feel so good about this today {emoji} {emoji}" for emoji in "\U0001f389\U0001f621"),
    ],
    ids=["emoji", "text and emoji", "punctuation", "arithmetic", "languages", "currencies", "vowel signs", "long"],
)  # fmt: skip
def test_texts_that_differ_in_signs_only_are_apart(texts: tuple[str, ...]) -> None:
    assert cluster(*texts) == list(range(len(texts)))


def sentence_of(first: str, last: str, seed: int, length: int = 200) -> str:
    random = np.random.default_rng(seed)
    return "".join(map(chr, random.integers(ord(first), ord(last), length)))


@pytest.mark.parametrize(
    ("first", "last"),
    [("\u4e00", "\u9f00"), ("\u3041", "\u3090"), ("\u0e01", "\u0e2e"), ("\u1000", "\u1020"), ("\u1780", "\u17a0")],
    ids=["Chinese", "Japanese", "Thai", "Burmese", "Khmer"],
)
def test_a_changed_character_is_found_in_scripts_without_spaces(first: str, last: str) -> None:
    text, other = sentence_of(first, last, 1), sentence_of(first, last, 2)
    changed = f"{text[:70]}{last}{text[71:]}"
    assert cluster(text, other, changed, f"{text[:90]}, {text[90:]}\u3002") == [0, 1, 0, 0]
    assert cluster(text[:3], text[:2] + last) == [0, 1]


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
        estimate = float(np.equal(*signatures([first, second])).mean())
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


def plain_signature(text: str) -> list[int]:
    """The definition: for each permutation the least hash of all shingles."""
    words = normalise(text).split()
    width = min(5, max(len(words), 1))
    shingles = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
    hashes = [xxhash.xxh64_intdigest(shingle.encode()) for shingle in shingles]
    return [min((h * int(factor) % 2**64) >> 32 for h in hashes) for factor in near_duplicates._FACTORS]


def plain_clusters(rows: npt.NDArray[np.uint32]) -> list[int]:
    """The definition: in each bucket of each band every row is compared with the first one of each kind."""
    near: list[tuple[int, int]] = []
    for band in range(0, 64, 4):
        buckets: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, values in enumerate(rows[:, band : band + 4].tolist()):
            buckets[tuple(values)].append(row)
        for members in buckets.values():
            while members:
                first, *rest = members
                alike = {row for row in rest if (rows[row] == rows[first]).mean() >= 0.8}
                near += [(first, row) for row in alike]
                members = [row for row in rest if row not in alike]
    cluster = list(range(len(rows)))
    for a, b in near:
        low, high = sorted((cluster[a], cluster[b]))
        cluster = [low if of == high else of for of in cluster]
    return cluster


@given(st.lists(st.one_of(st.text(), st.text("aB_1 é,\n", max_size=60)), min_size=1, max_size=20))
def test_many_texts_at_once_have_the_signatures_of_their_definition(texts: list[str]) -> None:
    assert signatures(texts).tolist() == [plain_signature(text) for text in texts]


@given(st.text(st.characters(max_codepoint=127)))
def test_a_text_of_ascii_is_normalised_as_any_other(text: str) -> None:
    for removed, table in (
        (near_duplicates._NO_WORD, near_duplicates._ASCII_WORDS),
        (near_duplicates._NO_SIGN, near_duplicates._ASCII_SIGNS),
    ):
        assert (
            near_duplicates._parted(text, removed, table) == near_duplicates._parted(f"{text} é", removed, table)[:-1]
        )


def test_long_and_short_texts_together_have_the_signatures_of_their_definition() -> None:
    texts = ["", " ".join(f"w{i % 700}" for i in range(3000)), "a b", "!", " ".join(f"w{i}" for i in range(513))]
    assert signatures(texts).tolist() == [plain_signature(text) for text in texts]


@pytest.mark.parametrize("at_once", [5, 65_536])
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 60), kinds=st.integers(1, 4), changed=st.floats(0, 0.3))
def test_clusters_are_those_of_their_definition(at_once: int, seed: int, rows: int, kinds: int, changed: float) -> None:
    random = np.random.default_rng(seed)
    of_kind = random.integers(0, 2**32, (kinds, 64), dtype=np.uint32)
    found = of_kind[random.integers(0, kinds, rows)]
    found = np.where(random.random(found.shape) < changed, random.integers(0, 9, found.shape, dtype=np.uint32), found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_ROWS_OF_A_GROUP", at_once)
        patch.setattr(near_duplicates, "_SCATTERED_ROWS", 3)
        assert clusters(found).tolist() == plain_clusters(found)


def test_signatures_in_a_file_make_the_same_clusters_and_leave_nothing(tmp_path: Path) -> None:
    texts = [SENTENCE, "something else", SENTENCE.upper(), "a third text"]
    with SignatureFile(tmp_path) as file:
        file.append(signatures(texts[:3]))
        file.append(signatures(texts[3:]))
        assert file.clusters().tolist() == cluster(*texts) == [0, 1, 0, 3]
        assert list(tmp_path.iterdir()) == []
