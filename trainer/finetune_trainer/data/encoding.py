"""Texts as tokens, piece by piece: a piece has the tokens that it has inside the whole text.

Special tokens that stand in the data are marked before the template is rendered, and tokenised as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from finetune_trainer.data.messages import THOUGHT_MARKS

# Noncharacters, which Unicode reserves for a program's own use (https://www.unicode.org/faq/private_use.html).
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around a special token that stands in the data."""
_JOINT = "\ufdd4"
RESERVED = "\ufdd0-\ufdd7"
_RESERVED = re.compile(f"[{RESERVED}]")
_MARKED = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
_TORN = re.compile(rf"[{RESERVED}]|\\ufdd[0-7]")
_MOST_TRIED = 8
_BEGINNINGS = ("x y", " x", "\nx")
_THOUGHT_TAGS = frozenset(mark for pair in THOUGHT_MARKS for mark in pair)


class MarkError(ValueError):
    """A text cannot be marked, or its marks were torn apart."""


class TextEncoder:
    """A tokenizer, and what was found out about it by trying it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = _plain_backend(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | {str(t) for t in tokenizer.all_special_tokens}
        self.special = _pattern(special)
        """Any special token; None where there are none."""
        self._to_mark = _pattern({*special}, f"[{RESERVED}]")
        ends = {token.content for token in added} | special
        self._added = _pattern(ends)
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._last_added = _pattern(ends, end=r"\Z")
        self._last_characters = frozenset(token[-1:] for token in ends)
        self._longest_added = max(map(len, ends), default=0)
        self.adds_bos = _adds_bos(tokenizer)
        self._joint = self._plain_joint = ("", 0)
        self._find_joints([t.content for t in added if t.special and not t.lstrip and not t.rstrip])
        self._needs_anchor = lru_cache(maxsize=1000)(self._find_need)
        self._short_ids = lru_cache(maxsize=1000)(self._part_ids)

    # --- marks ---

    def mark(self, value: Any, *, of_answer: bool = False) -> Any:
        """Texts with their special tokens marked, also inside lists and objects.

        of_answer: tags around thoughts are what the model has to write, and are not marked. Raises MarkError.
        """
        if isinstance(value, str):
            if self._to_mark is None or not self._to_mark.search(value):
                return value
            if reserved := _RESERVED.search(value):
                raise MarkError(f"a text holds U+{ord(reserved[0]):04X}, which is no character: remove it")

            def marked(token: re.Match[str]) -> str:
                return token[0] if of_answer and token[0] in _THOUGHT_TAGS else f"{OPEN}{token[0]}{CLOSE}"

            return self._to_mark.sub(marked, value)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item, of_answer=of_answer) for key, item in value.items()}
        return [self.mark(item, of_answer=of_answer) for item in value] if isinstance(value, list) else value

    @staticmethod
    def shown(text: str) -> str:
        """A rendered text without marks."""
        return text.replace(OPEN, "").replace(CLOSE, "") if OPEN in text else text

    def marked_tokens(self, text: str) -> list[str]:
        """The special tokens that stand in the data of a rendered text. Raises MarkError for torn marks."""
        if not _TORN.search(text):
            return []
        tokens = [match[1] for match in _MARKED.finditer(text)]
        whole = self.special is not None and all(self.special.fullmatch(token) for token in tokens)
        if not whole or _TORN.search(_MARKED.sub("", text)):
            raise MarkError("the chat template takes apart a special token that stands in a message: remove it there")
        return tokens

    # --- tokens ---

    def ids(self, text: str, before: str = "") -> list[int]:
        """Ids of a text that follows `before`, or begins; what is marked in it is plain text."""
        ids: list[int] = []
        for number, part in enumerate(_MARKED.split(text)):
            if part:
                ids += self._part_ids(part, before, number % 2 == 1)
                before = part
        return ids

    def whole_ids(self, text: str) -> list[int]:
        """Ids of a whole text as the library computes them."""
        return self._raw_ids(text, as_plain=False)

    def split_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Ids of the whole text, cut where each text begins. None where a token may reach from one into the next.

        No token reaches over an added token. So a text has the tokens that it has without what follows it, if those
        behind its last added token are the same.
        """
        if self._added is None:
            return None
        ids = self.whole_ids("".join(texts))
        places = [i for i, token in enumerate(ids) if token in self._added_ids]
        pieces, begin, seen = [], 0, 0
        for number, text in enumerate(texts, start=1):
            tokens = list(self._added.finditer(text))
            seen += len(tokens)
            end = len(ids)
            if number < len(texts):
                if not tokens or seen > len(places):
                    return None
                rest = text[tokens[-1].end() :]
                behind = self._short_ids(rest, tokens[-1][0]) if rest else []
                end = places[seen - 1] + 1 + len(behind)
                if ids[places[seen - 1] + 1 : end] != behind:
                    return None
            pieces.append(ids[begin:end])
            begin = end
        return pieces if seen == len(places) else None

    def separate_ids(self, texts: Sequence[str]) -> list[int]:
        """Ids of texts joined so that no token reaches from one into the next, each but the first inside a text."""
        joint, count = self._joint
        ids, mark = self.whole_ids(joint.join(texts)), self.whole_ids(joint * 2)[count:]
        separate: list[int] = []
        at = 0
        while at < len(ids):
            if mark and ids[at : at + len(mark)] == mark:
                at += len(mark)
            else:
                separate.append(ids[at])
                at += 1
        return separate

    def ends_with_token(self, text: str) -> bool:
        """Whether a text ends with an added token, behind which no token of the text before can reach."""
        return bool(self._token_at_end(text))

    def _part_ids(self, text: str, before: str, as_plain: bool = False) -> list[int]:
        if not before:
            return self._raw_ids(text, as_plain)
        if as_plain:
            anchor, count = self._plain_joint
        else:
            last = self._token_at_end(before)
            anchor, count = (last, 1) if last else self._joint
        if not self._needs_anchor(anchor):
            anchor, count = "", 0
        return self._raw_ids(f"{anchor}{text}", as_plain)[count:]

    def _token_at_end(self, text: str) -> str:
        if self._last_added is None or text[-1:] not in self._last_characters:
            return ""
        found = self._last_added.search(text[-self._longest_added :])
        return found[0] if found else ""

    def _find_need(self, anchor: str) -> bool:
        """Whether a text has other tokens after the anchor than at a beginning."""
        count = len(self.whole_ids(anchor))
        return any(self.whole_ids(anchor + text)[count:] != self.whole_ids(text) for text in _BEGINNINGS)

    def _find_joints(self, special: list[str]) -> None:
        """Find something behind which a text has the tokens that it has inside another text."""
        count = len(self.whole_ids(_JOINT))
        if all(self.whole_ids(_JOINT + text)[:count] == self.whole_ids(_JOINT) for text in _BEGINNINGS):
            self._joint = self._plain_joint = (_JOINT, count)
        # A special token is better where it does the same: no token can reach over it.
        for token in special[:_MOST_TRIED]:
            behind = [self.whole_ids(token + text)[1:] for text in _BEGINNINGS]
            if not count or behind == [self.whole_ids(_JOINT + text)[count:] for text in _BEGINNINGS]:
                self._joint = (token, 1)
                return

    def _raw_ids(self, text: str, as_plain: bool) -> list[int]:
        if self._backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=as_plain))
        if self._backend.encode_special_tokens != as_plain:
            self._backend.encode_special_tokens = as_plain
        # "Fast" only in that it keeps no offsets.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


def _pattern(tokens: set[str], *more: str, end: str = "") -> re.Pattern[str] | None:
    alternatives = [*map(re.escape, sorted(filter(None, tokens), key=len, reverse=True)), *more]
    return re.compile(f"(?:{'|'.join(alternatives)}){end}") if alternatives else None


def _plain_backend(tokenizer: Any) -> Any | None:
    """The library that a tokenizer's `encode` only wraps, at several times the cost; None where it does more."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    wraps = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.encode is PreTrainedTokenizerBase.encode
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    if not wraps:
        return None
    tokenizer.encode("x")  # takes away the truncation and padding that a tokenizer's file may ask for
    return tokenizer.backend_tokenizer


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer.encode("x"))[:1] == [bos]
