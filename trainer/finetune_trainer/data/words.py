"""Words of texts in any script, as metrics and baselines count them.

Where a script writes no spaces between words (Chinese, Japanese, Thai, …), each character counts as a word. Which
scripts these are is Unicode's decision: lines may be broken within their words (UAX #14).
"""

from __future__ import annotations

import unicodedata

import regex

_BREAKABLE = "".join(rf"\p{{Line_Break={name}}}" for name in ("ID", "CJ", "NS", "SA", "AK", "AP", "AS", "VF", "VI"))
_WORD_CHARACTER = r"\p{L}\p{M}\p{N}"
_UNSPACED = regex.compile(rf"(?V1)(?=[[{_WORD_CHARACTER}]&&[{_BREAKABLE}]])\X")
"""One character (grapheme cluster, UAX #29) of a script without spaces between words."""
_IGNORED = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_NO_WORD = regex.compile(rf"[^{_WORD_CHARACTER}\p{{Default_Ignorable_Code_Point}}]+")


def fold(text: str) -> str:
    """The text without differences of case, width, composition and invisible characters (Unicode's NFKC_Casefold)."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _IGNORED.sub("", text)).casefold())


def spaced(text: str) -> str:
    """The text with spaces around each character of a script without spaces between words."""
    return text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)


def words(text: str) -> list[str]:
    """The folded words of a text: letters, marks and digits; what stands between them is left out."""
    return spaced(fold(_NO_WORD.sub(" ", text))).split()
