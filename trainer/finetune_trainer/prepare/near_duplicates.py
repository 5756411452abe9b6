"""Texts that say nearly the same, found without comparing all pairs.

Method: MinHash (Broder 1997) over the set of five-word shingles of the normalised text (case, punctuation and
spacing removed; a character is a word where a script writes no spaces, and so is a symbol such as an emoji), 64
permutations, banded 16 × 4 (locality-sensitive hashing, Indyk and Motwani 1998); two texts of one bucket are
near-duplicates if their signatures agree in at least 80% of the places, which estimates a Jaccard similarity of 0.8.
Texts of fewer than five words are compared as a whole, with signs such as `-` and `/`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import regex
import xxhash

from finetune_trainer.data.words import fold, spaced

SHINGLE_WORDS = 5
PERMUTATIONS = 64
BANDS = 16
THRESHOLD = 0.8
LARGE_CLUSTER_SHARE = 0.01
LARGE_CLUSTER_ROWS = 10
"""Clusters above this share of the rows, and this many, are reported and not kept together: they would unbalance
the split."""
METHOD = (
    f"MinHash over shingles of {SHINGLE_WORDS} words (characters in scripts without spaces), "
    f"{PERMUTATIONS} permutations, similarity at least {THRESHOLD}"
)

Signatures = npt.NDArray[np.uint32]

_generator = np.random.default_rng(20240607)
_FACTORS = _generator.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_NO_WORD = regex.compile(r"(?V1)(?:[^\p{L}\p{M}\p{N}\p{S}]|[`^|~])+")
_NO_SIGN = regex.compile(r"""(?V1)(?:[\p{Z}\p{C}.,;:!?"'()\[\]{}_`]|[\p{P}--\p{ASCII}])+""")
_SYMBOL = regex.compile(r"(?V1)[\p{S}--\p{ASCII}]")


def _ascii_table(removed: regex.Pattern[str]) -> bytes:
    """Table of the bytes of an ASCII text: in lower case, and spaces for those that are removed."""
    return bytes(32 if code > 127 or removed.match(chr(code)) else ord(chr(code).lower()) for code in range(256))


_ASCII_WORDS, _ASCII_SIGNS = _ascii_table(_NO_WORD), _ascii_table(_NO_SIGN)
_HASHES_AT_ONCE = 512
"""Shingles whose hashes are permuted at once: their products stay in the processor's cache."""
_ROWS_AT_ONCE = 8192
_SCATTERED_ROWS = 2048
_ROWS_OF_A_GROUP = 65_536
"""Rows whose signatures are held at once to compare them."""


def normalise(text: str) -> str:
    """The text in lower case, words parted by one space, nothing else."""
    words = _parted(text, _NO_WORD, _ASCII_WORDS)
    if len(words) < SHINGLE_WORDS:
        words = _parted(text, _NO_SIGN, _ASCII_SIGNS) or text.split()
    return " ".join(words)


def _parted(text: str, removed: regex.Pattern[str], ascii_table: bytes) -> list[str]:
    if text.isascii():  # the same, several times as fast
        return text.encode().translate(ascii_table).decode().split()
    return spaced(_SYMBOL.sub(r" \g<0> ", fold(removed.sub(" ", text)))).split()


def signatures(texts: Sequence[str]) -> Signatures:
    """MinHash signatures of texts, uint32[n, 64]. Equal normalised texts have equal signatures."""
    if not texts:
        return np.empty((0, PERMUTATIONS), np.uint32)
    # Normalised, a text has no whitespace but single spaces, so a shingle is a piece of it.
    joined_texts = "\n".join(map(normalise, texts)).encode()
    codes = np.frombuffer(joined_texts, np.uint8)
    text_ends = np.r_[np.flatnonzero(codes == ord("\n")), len(codes)]
    word_ends = np.r_[np.flatnonzero((codes == ord("\n")) | (codes == ord(" "))), len(codes)]
    word_begins = np.r_[0, word_ends[:-1] + 1]
    last = np.searchsorted(word_ends, text_ends)
    words = np.diff(last, prepend=-1)
    counts = np.maximum(words - SHINGLE_WORDS + 1, 1)
    starts = np.cumsum(counts) - counts
    first_word = np.arange(counts.sum()) + np.repeat(last - words + 1 - starts, counts)
    last_word = first_word + np.repeat(np.minimum(words, SHINGLE_WORDS) - 1, counts)
    pieces = map(slice, word_begins[first_word].tolist(), word_ends[last_word].tolist())
    hashes = map(xxhash.xxh64_intdigest, map(joined_texts.__getitem__, pieces))
    return _least(np.fromiter(hashes, np.uint64, len(first_word)), starts)


def _least(hashes: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64]) -> Signatures:
    """Least hash of each text under each permutation, uint32[n, 64]; starts: where the texts begin among `hashes`."""
    least = np.full((PERMUTATIONS, len(starts)), np.iinfo(np.uint64).max)
    for begin in range(0, len(hashes), _HASHES_AT_ONCE):
        part = hashes[begin : begin + _HASHES_AT_ONCE]
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        end = int(np.searchsorted(starts, begin + len(part)))
        # Multiply-shift hashing: the product wraps at 2^64, and its upper half orders the shingles anew a factor.
        products = np.multiply.outer(_FACTORS, part)
        here = np.minimum.reduceat(products, np.maximum(starts[first:end] - begin, 0), axis=1)
        least[:, first:end] = np.minimum(least[:, first:end], here)
    return np.ascontiguousarray((least >> np.uint64(32)).T.astype(np.uint32))


class SignatureFile:
    """Signatures in a file without a name, so that memory does not grow by 256 bytes per row. Used with `with`."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory`: where the file takes room; the system's place for such files where left out."""
        self._file = TemporaryFile(dir=directory)  # noqa: SIM115 - closed by `__exit__`

    def append(self, signatures: Signatures) -> None:
        """Add the signatures of further rows, uint32[n, 64]."""
        self._file.write(signatures.tobytes())

    def clusters(self) -> npt.NDArray[np.int64]:
        """`clusters` of all rows that were added."""
        self._file.flush()
        if not self._file.tell():
            return np.empty(0, np.int64)
        pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = np.frombuffer(pages, np.uint32).reshape(-1, PERMUTATIONS)
        return clusters(mapped, lambda: pages.madvise(mmap.MADV_DONTNEED))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def clusters(signatures: Signatures, looked: Callable[[], None] = lambda: None) -> npt.NDArray[np.int64]:
    """Cluster of each row, int64[n]: the index of its first member. signatures: uint32[n, 64].

    Members of a bucket are compared with the bucket's first member of each kind, so time grows with the rows.
    `looked` is called after every few thousand rows that were read.
    """
    cluster = np.arange(len(signatures), dtype=np.int64)
    for band in range(BANDS):
        pairs = [
            pair
            for members, bucket in _groups(*_buckets(signatures, band, looked))
            for pair in _near_pairs(signatures, members, bucket, looked)
        ]
        if pairs:
            cluster = _joined_pairs(cluster, np.concatenate(pairs, axis=1))
    return cluster


def _groups(
    members: npt.NDArray[np.int64], bucket: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Whole buckets, some at a time: the largest first, so that buckets of one group need as many comparisons."""
    _, number, sizes = np.unique(bucket, return_inverse=True, return_counts=True)
    order = np.lexsort((number, -sizes[number]))
    members, bucket = members[order], bucket[order]
    ends = np.cumsum(np.sort(sizes)[::-1])
    begin = 0
    while begin < len(members):
        at_least = np.searchsorted(ends, begin, side="right")
        fitting = np.searchsorted(ends, begin + _ROWS_OF_A_GROUP, side="right") - 1
        end = int(ends[max(at_least, fitting)])
        yield members[begin:end], bucket[begin:end]
        begin = end


def _near_pairs(
    signatures: Signatures, members: npt.NDArray[np.int64], bucket: npt.NDArray[np.int64], looked: Callable[[], None]
) -> Iterator[npt.NDArray[np.int64]]:
    """int64[2, m]: rows of one bucket that are near-duplicates, the first of a kind and another."""
    places, names = members, None
    if len(members) <= _ROWS_OF_A_GROUP:  # each is read once, however often it is compared
        signatures, places, names = _read(signatures, members, looked), np.arange(len(members)), members
    while len(places):
        begins = np.r_[True, bucket[1:] != bucket[:-1]]
        firsts = places[begins][np.cumsum(begins) - 1]
        firsts, places, bucket = firsts[~begins], places[~begins], bucket[~begins]
        alike = _alike(signatures, firsts, places, looked)
        pairs = np.stack([firsts[alike], places[alike]])
        yield pairs if names is None else names[pairs]
        places, bucket = places[~alike], bucket[~alike]


def _read(signatures: Signatures, rows: npt.NDArray[np.int64], looked: Callable[[], None]) -> Signatures:
    """The signatures of some rows, a few at a time: scattered rows of a file take many times their size."""
    values = np.empty((len(rows), PERMUTATIONS), np.uint32)
    for begin in range(0, len(rows), _SCATTERED_ROWS):
        values[begin : begin + _SCATTERED_ROWS] = signatures[rows[begin : begin + _SCATTERED_ROWS]]
        looked()
    return values


def _buckets(
    signatures: Signatures, band: int, looked: Callable[[], None]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(rows, bucket of each) where several rows have the same values in a band, by bucket and in the rows' order."""
    width = PERMUTATIONS // BANDS
    halves = np.empty((2, len(signatures)), np.uint64)
    for begin in range(0, len(signatures), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        halves[:, rows] = np.ascontiguousarray(signatures[rows, band * width : (band + 1) * width]).view(np.uint64).T
        looked()
    order = np.argsort(halves[0], kind="stable")
    order = order[_repeated(halves[0][order])]
    order = order[np.lexsort((halves[1][order], halves[0][order]))]
    ordered = halves[:, order]
    number = np.r_[0, np.cumsum(np.any(ordered[:, 1:] != ordered[:, :-1], axis=0))][: len(order)]
    repeated = _repeated(number)
    return order[repeated], number[repeated]


def _repeated(ordered: npt.NDArray[np.uint64] | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the ordered values stand there more than once."""
    same = ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(ordered), np.bool_)
    repeated[1:] |= same
    repeated[:-1] |= same
    return repeated


def _alike(
    signatures: Signatures, some: npt.NDArray[np.int64], others: npt.NDArray[np.int64], looked: Callable[[], None]
) -> npt.NDArray[np.bool_]:
    """Whether the rows are near-duplicates, pair by pair."""
    alike = np.empty(len(some), np.bool_)
    for begin in range(0, len(some), _ROWS_AT_ONCE):
        pairs = slice(begin, begin + _ROWS_AT_ONCE)
        same = np.packbits(signatures[some[pairs]] == signatures[others[pairs]], axis=1)
        alike[pairs] = np.bitwise_count(same.view(np.uint64)[:, 0]) >= THRESHOLD * PERMUTATIONS
        looked()
    return alike


def _joined_pairs(cluster: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Clusters after both rows of every pair, int64[2, m], are in one; each is named by its first row."""
    cluster = cluster.copy()
    while True:
        first, second = cluster[pairs]
        apart = first != second
        if not apart.any():
            return cluster
        np.minimum.at(cluster, np.maximum(first, second)[apart], np.minimum(first, second)[apart])
        while not np.array_equal(nearer := cluster[cluster], cluster):
            cluster = nearer


def keep_together(cluster: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """(what goes together, sizes of the clusters too large for that): rows of a large cluster stand alone.

    cluster: int64[n], the cluster of each row; what goes together: int64[n], the number of its first row.
    """
    _, first, number, sizes = np.unique(cluster, return_index=True, return_inverse=True, return_counts=True)
    too_large = sizes > max(LARGE_CLUSTER_SHARE * len(cluster), LARGE_CLUSTER_ROWS)
    together = np.where(too_large[number], np.arange(len(cluster)), first[number])
    return together, sorted(sizes[too_large].tolist(), reverse=True)


def joined(first: npt.NDArray[np.int64], second: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """What goes together where rows with an equal value in either do, int64[n]."""
    rows = np.arange(len(first), dtype=np.int64)
    cluster = rows
    for keys in (first.tolist(), second):
        seen: dict[Hashable, int] = {}
        firsts = np.fromiter((seen.setdefault(key, row) for row, key in enumerate(keys)), np.int64, len(rows))
        cluster = _joined_pairs(cluster, np.stack([firsts, rows]))
    return cluster
