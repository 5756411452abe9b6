"""From a step's list of documents to the micro-batches of every rank.

The division is a pure function of the documents' lengths: every rank computes all of it and takes its own part,
so nothing is exchanged and all ranks run the same number of micro-batches.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.data.prefixes import Shared, among, computed_tokens

FILLER_TOKENS = 8
"""Tokens of a micro-batch without a label, which a rank runs only to keep step with the others."""


class TokenizedDocument(Protocol):
    """What is needed of a tokenised document; positions are those of the hidden states that predict the targets."""

    @property
    def ids(self) -> NDArray[np.int32]: ...
    @property
    def target_position(self) -> NDArray[np.int32]: ...
    @property
    def target_id(self) -> NDArray[np.int32]: ...
    @property
    def target_weight(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: packed (one row, several documents) or padded (one document per row, B rows).

    Padded batches are those with an `attention_mask`. Targets refer to hidden states in the flattened [B*T].
    """

    ids: Tensor
    """int64[B, T]; B is 1 when packed."""
    positions: Tensor
    """int64[B, T]; begins at 0 again with every document (padding at the end counts as one more), and goes on after
    a shared prefix."""
    cu_seqlens: Tensor
    """int32[n+1]: where segments begin in the flattened row: documents, shared prefixes and what their documents have
    of their own; trailing padding is one more. For padded batches the rows' bounds, multiples of T."""
    bounds: tuple[int, ...]
    """The same, where it can be read without waiting for a device."""
    max_length: int
    """Longest segment of `cu_seqlens`, in tokens."""
    target_position: Tensor
    """int64[L]: index into the flattened hidden states."""
    target_id: Tensor
    """int64[L]: the token to be predicted there."""
    target_weight: Tensor
    """float32[L]: the target's share of the step's loss; the loss is sum(weight * cross entropy) over all ranks."""
    target_document: Tensor
    """int64[L]: the document's index in the step's list."""
    attention_mask: Tensor | None = None
    """int64[B, T], 1 for tokens and 0 for padding; None when packed."""
    tokens: int = 0
    """Tokens that are not padding, as they are computed: a shared prefix counts once."""
    shared: tuple[tuple[int, int, int], ...] = ()
    """(a, b, c) for every shared prefix: its tokens are [a, b) of the row, the own parts of its documents [b, c)."""

    @property
    def packed(self) -> bool:
        """Whether several documents may share the row."""
        return self.attention_mask is None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copy does not wait."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


# --- which documents share a row -------------------------------------------------------------------------------------


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1, groups: Sequence[Shared] = ()) -> list[list[int]]:
    """Rows of documents with at most `capacity` tokens each, their number a multiple of `multiple`.

    As few rows as best-fit decreasing needs, rounded up; over these the documents are spread evenly, so that no rank
    waits for another. A document longer than the capacity has a row of its own. Rows may be empty (fewer documents
    than rows). Rows are ordered from the fullest to the emptiest, documents within a row by index.

    What a group of documents shares counts once in every row that holds some of them. Groups are divided where that
    makes the ranks' longest rows shorter.
    """
    if groups:
        return _pack_sharing(lengths, capacity, multiple, groups)
    fewest = best_fit_decreasing(lengths, capacity)
    count = -(-len(fewest) // multiple) * multiple
    rows = _spread_evenly(lengths, capacity, count) or fewest + [[] for _ in range(count - len(fewest))]
    return _ordered(rows, lengths)


def _pack_sharing(lengths: Sequence[int], capacity: int, multiple: int, groups: Sequence[Shared]) -> list[list[int]]:
    """The best of a few ways to divide the groups, measured by the longest row of every micro-batch."""

    def divided(most: int) -> tuple[list[list[int]], tuple[int, int]]:
        blocks = _blocks(lengths, capacity, groups, most)
        costs = [_computed(lengths, groups, block) for block in blocks]
        rows = [[i for block in row for i in blocks[block]] for row in pack(costs, capacity, multiple)]
        loads = sorted(((_computed(lengths, groups, row), sorted(row)) for row in rows), key=lambda x: (-x[0], x[1]))
        return [row for _, row in loads], (sum(load for load, _ in loads[::multiple]), sum(load for load, _ in loads))

    rows, cost = divided(capacity)
    if multiple == 1:
        return rows
    own = computed_tokens(lengths, groups) - sum(group.length for group in groups)
    even = -(-own // len(rows))
    return min([(rows, cost), divided(even), divided(-(-even // 2))], key=lambda found: found[1])[0]


def _blocks(lengths: Sequence[int], capacity: int, groups: Sequence[Shared], most: int) -> list[list[int]]:
    """Documents that stay together: parts of a group with at most `most` own tokens, and the others one by one."""
    blocks = []
    for group in groups:
        own = [lengths[i] - group.length for i in group.members]
        parts = pack(own, max(1, min(most, capacity - group.length)))
        blocks += [[group.members[i] for i in part] for part in parts]
    alone = set(range(len(lengths))) - {i for block in blocks for i in block}
    return blocks + [[i] for i in sorted(alone)]


def _computed(lengths: Sequence[int], groups: Sequence[Shared], row: Sequence[int]) -> int:
    """Tokens of a row of documents."""
    return computed_tokens([lengths[i] for i in row], among(groups, row))


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows by best-fit decreasing: each document, longest first, into the fullest row that still holds it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[index], -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = max(capacity, lengths[index]), len(rows)
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (left - lengths[index], row))
    return rows


def _spread_evenly(lengths: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    """Longest first, each into the emptiest of `count` rows; None if one does not fit."""
    rows: list[list[int]] = [[] for _ in range(count)]
    load = [(0, row) for row in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, row = heapq.heappop(load)
        if tokens and tokens + lengths[index] > capacity:
            return None
        rows[row].append(index)
        heapq.heappush(load, (tokens + lengths[index], row))
    return rows


def bucket(lengths: Sequence[int], capacity: int, multiple: int = 1, extra: int = 0) -> list[list[int]]:
    """Padded batches of documents of similar length, their number a multiple of `multiple`.

    A batch of B documents, the longest of T tokens, costs B * (T + extra) <= capacity, or holds one document;
    `extra` are the virtual tokens of prompt and prefix tuning. The costliest batches are halved until the number
    is a multiple; batches may be empty (fewer documents than ranks).
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + extra) > capacity:
            batches.append([])
        batches[-1].append(index)

    def cost(batch: list[int]) -> int:
        return len(batch) * (lengths[batch[0]] + extra)

    while len(batches) % multiple:
        costliest = max((b for b in batches if len(b) > 1), key=cost, default=None)
        if costliest is None:
            batches.append([])
            continue
        batches.remove(costliest)
        half = len(costliest) // 2
        batches += [costliest[:half], costliest[half:]]
    return _ordered(batches, lengths)


def _ordered(rows: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    rows = [sorted(row) for row in rows]
    return sorted(rows, key=lambda row: (-sum(lengths[i] for i in row), row))


def share_out(rows: Sequence[list[int]], world_size: int) -> list[list[list[int]]]:
    """Rows by [micro-batch][rank]; the ranks' rows of one micro-batch are of nearly the same size."""
    return [list(rows[i : i + world_size]) for i in range(0, len(rows), world_size)]


# --- the tensors of a row --------------------------------------------------------------------------------------------


def collate_packed(
    documents: Sequence[TokenizedDocument],
    slots: Sequence[int],
    weights: Sequence[NDArray[np.float32]],
    pad_id: int,
    multiple: int = 1,
    groups: Sequence[Shared] = (),
) -> Batch:
    """One row with the documents one after the other, padded at the end to a multiple of `multiple` tokens.

    `slots` are the documents' indices in the step's list, `weights` the shares of their targets in the step's loss,
    `groups` those of the documents that share a prefix: it stands once before what they have of their own.
    No documents give a filler: a few tokens of padding without a label.
    """
    segments, shared = _segments(documents, groups)
    lengths = [segment.end - segment.start for segment in segments]
    used = sum(lengths)
    total = -(-max(used, 1) // multiple) * multiple if used else max(FILLER_TOKENS, multiple)
    ids = np.full(total, pad_id, dtype=np.int64)
    positions = np.zeros(total, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for segment, start, end in zip(segments, starts, starts[1:], strict=False):
        ids[start:end] = documents[segment.document].ids[segment.start : segment.end]
        positions[start:end] = np.arange(segment.start, segment.end)
    positions[used:] = np.arange(total - used)
    bounds = np.append(starts, total) if total > used else starts
    return Batch(
        ids=torch.from_numpy(ids)[None],
        positions=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        bounds=tuple(bounds.tolist()),
        max_length=int(np.diff(bounds).max()),
        tokens=used,
        shared=shared,
        **_targets(documents, slots, weights, _target_places(documents, segments, starts)),
    )


@dataclass(frozen=True)
class _Segment:
    """Tokens [start, end) of a document; `shared` if they stand for its whole group."""

    document: int
    start: int
    end: int
    shared: bool = False


def _segments(
    documents: Sequence[TokenizedDocument], groups: Sequence[Shared]
) -> tuple[list[_Segment], tuple[tuple[int, int, int], ...]]:
    """The segments of a row in order, those of groups last; and `Batch.shared`."""
    grouped = {i for group in groups for i in group.members}
    segments = [_Segment(i, 0, len(d.ids)) for i, d in enumerate(documents) if i not in grouped]
    at = sum(segment.end for segment in segments)
    shared = []
    for group in groups:
        segments.append(_Segment(group.members[0], 0, group.length, shared=True))
        own = [_Segment(i, group.length, len(documents[i].ids)) for i in group.members]
        begin, at = at + group.length, at + group.length + sum(part.end - part.start for part in own)
        shared.append((begin - group.length, begin, at))
        segments += own
    return segments, tuple(shared)


def _target_places(
    documents: Sequence[TokenizedDocument], segments: Sequence[_Segment], starts: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Where in the row each document's targets are predicted: in its own part, or at the end of its prefix."""
    places = [np.empty(0, np.int64)] * len(documents)
    prefix_start = 0
    for segment, start in zip(segments, starts, strict=False):
        if segment.shared:
            prefix_start = int(start)
            continue
        at = documents[segment.document].target_position.astype(np.int64)
        places[segment.document] = np.where(at < segment.start, prefix_start + at, start - segment.start + at)
    return places


def collate_padded(
    documents: Sequence[TokenizedDocument], slots: Sequence[int], weights: Sequence[NDArray[np.float32]], pad_id: int
) -> Batch:
    """One document per row, padded on the right to the longest. Arguments as for `collate_packed`."""
    lengths = [len(document.ids) for document in documents]
    rows, width = max(len(documents), 1), max(lengths, default=FILLER_TOKENS)
    ids = np.full((rows, width), pad_id, dtype=np.int64)
    mask = np.zeros((rows, width), dtype=np.int64)
    for index, document in enumerate(documents):
        ids[index, : lengths[index]] = document.ids
        mask[index, : lengths[index]] = 1
    if not documents:
        mask[:] = 1  # a row that attends to nothing would be all NaN
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.arange(width).repeat(rows, 1),
        cu_seqlens=torch.arange(0, (rows + 1) * width, width, dtype=torch.int32),
        bounds=tuple(range(0, (rows + 1) * width, width)),
        max_length=width,
        attention_mask=torch.from_numpy(mask),
        tokens=sum(lengths),
        **_targets(
            documents, slots, weights, [d.target_position.astype(np.int64) + i * width for i, d in enumerate(documents)]
        ),
    )


def _targets(
    documents: Sequence[TokenizedDocument],
    slots: Sequence[int],
    weights: Sequence[NDArray[np.float32]],
    positions: Sequence[NDArray[np.int64]],
) -> dict[str, Any]:
    counts = [len(document.target_id) for document in documents]
    return {
        "target_position": _joined(positions, np.int64),
        "target_id": _joined([document.target_id for document in documents], np.int64),
        "target_weight": _joined(list(weights), np.float32),
        "target_document": torch.from_numpy(np.repeat(np.asarray(slots, dtype=np.int64), counts)),
    }


def _joined(parts: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype))
