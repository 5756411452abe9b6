"""Where every beginning of a rendered chat ends, read off one rendering of the whole chat. Pure but for the template.

The loss mask of a chat is found from the template's text for its first 1, 2, … n messages: n renderings, of n / 2
messages on average. Chats of the same roles mostly have the same text around their messages' contents, so that text is
found once, from a chat of placeholders. Where a chat's text is that text around its own contents, to the last
character, its beginnings end where those of the placeholders do. (What a template would do to a last message alone, and
only for what stands in it, would not be seen.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

_SPACE = "\u2003"
"""Around a placeholder: white space that no template writes, to see whether a template trims."""
_PLACEHOLDER = re.compile(f"({_SPACE}?)\ufdd2(\\d+)\ufdd3({_SPACE}?)")


@dataclass(frozen=True)
class TemplateSkeleton:
    """The text around the contents of a chat of n messages."""

    pieces: tuple[str, ...]
    """n + 1: before the first content, between two, after the last."""
    trimmed: tuple[bool, ...]
    """Whether white space around a content is left out, for each message."""
    suffix_lengths: Mapping[tuple[int, bool], int]
    """(messages, whether an answer is asked for) -> characters of that beginning after its last content."""

    def ends(self, whole: str, contents: Sequence[str]) -> list[int] | None:
        """Where each message's content ends in the chat's text; None where the text is made otherwise."""
        shown = [content.strip() if trim else content for content, trim in zip(contents, self.trimmed, strict=True)]
        parts = [part for pair in zip(self.pieces, shown, strict=False) for part in pair]
        if whole != "".join([*parts, self.pieces[-1]]):
            return None
        return list(accumulate(map(len, parts)))[1::2]


def answer_turns(roles: Sequence[str]) -> list[int]:
    """Which messages answer. A greeting at the very beginning answers nothing: it is part of what is given."""
    return [i for i, role in enumerate(roles) if role == "assistant" and i > 0]


def template_skeleton(
    render: Callable[[Sequence[dict[str, str]], bool], str], roles: Sequence[str], turns: Sequence[int]
) -> TemplateSkeleton | None:
    """The text around the contents of chats of these roles; `render` takes messages and whether to ask for an answer.

    turns: the answers whose beginnings are wanted.

    None where a beginning is not the beginning of the whole, or where contents do not stand in it as they are.
    """
    messages = [{"role": role, "content": f"{_SPACE}\ufdd2{i}\ufdd3{_SPACE}"} for i, role in enumerate(roles)]
    whole = render(messages, False)
    places = list(_PLACEHOLDER.finditer(whole))
    bounds = [0, *(bound for place in places for bound in place.span()), len(whole)]
    pieces = tuple(whole[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True))
    in_order = [int(place[2]) for place in places] == list(range(len(roles)))
    if not in_order or any(place[1] != place[3] for place in places):
        return None
    suffix_lengths = {}
    for turn in turns:
        for count, ask in ((turn, True), (turn + 1, False)):
            text = render(messages[:count], ask)
            suffix_lengths[count, ask] = len(text) - places[count - 1].end()
            if not whole.startswith(text) or suffix_lengths[count, ask] < 0:
                return None
    return TemplateSkeleton(pieces, tuple(not place[1] for place in places), suffix_lengths)
