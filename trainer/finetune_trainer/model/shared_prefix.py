"""Attention over rows whose documents share a prefix: its keys and values are computed once and seen by all of them.

A query of a document's own part attends to two sets of keys: the prefix (all of it, no mask) and the part itself
(causal). Each set is one call of a flash kernel, all documents of a group together for the prefix; the two results
are put together by their log-sum-exps, and the backward pass runs each call again with the output and log-sum-exp of
the whole, as in ring attention (https://arxiv.org/abs/2310.01889). So nothing is gathered a document, no mask is
built, and the prefix gets the gradients of all documents. Measured for a layer of 9 heads of 64, 64 documents of 14
tokens behind 400, forward and backward on two cores: 58 ms; with one dense mask 179 ms; apart 4.7 s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Span = tuple[int, int]
Gradients = tuple[Tensor, Tensor, Tensor]

MOST_KERNEL_DEVIATION = 0.05
"""Relative difference that rounding in 16 bits stays well below."""

LONGEST_UNDIVIDED = 96
"""Tokens of a segment up to which one call on a CPU is as fast as several."""
QUERIES_PER_CALL = 64
"""Queries of a longer segment that the kernel for CPUs gets at once."""

_masks_only = False


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the segments of a packed row are; a class, so that compiled layers do not look inside."""

    segments: tuple[Span, ...]
    """[start, end) of every segment of the row: each attends to itself causally."""
    shared: tuple[tuple[int, int, int], ...]
    """(a, b, c): the segments within [b, c) attend to [a, b) too."""

    @classmethod
    def of(cls, bounds: Sequence[int], shared: tuple[tuple[int, int, int], ...]) -> Layout:
        """The layout of a row whose segments lie between `bounds`."""
        return cls(tuple(itertools.pairwise(bounds)), shared)

    def longest(self) -> int:
        """Tokens of the longest document, with its prefix."""
        return max(end - start + self.before(start) for start, end in self.segments)

    def before(self, start: int) -> int:
        """Tokens of the prefix of the segment that begins there; 0 if it has none."""
        return next((b - a for a, b, c in self.shared if b <= start < c), 0)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # other segments in every row: a graph for each would be compiled
def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention within documents, some of which share a prefix.

    query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = _kernel(query, value, layout, window)
    if not isinstance(kernel, _OnCpu):
        key, value = repeated(query, key, value)
    if kernel is None:
        return _masked(query, key, value, layout, scale, window)
    output = _Merged.apply(query, key, value, kernel, scale)
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)


def repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for every head: SDPA's own grouping falls back to its slowest kernel on some devices."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


@contextmanager
def masks_only() -> Iterator[None]:
    """Within it no flash kernel is used: rounding is then as in attention to one set of keys."""
    global _masks_only
    _masks_only = True
    try:
        yield
    finally:
        _masks_only = False


def kernel_obstacle(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why this device's kernel must not be used for heads of that width; empty if it computes what masks compute."""
    try:
        deviation = kernel_deviation(width, dtype, device)
    except (RuntimeError, TypeError, AttributeError) as error:  # another release of PyTorch, a GPU without flash
        return f"this device does not support it: {str(error).splitlines()[0][:200]}"
    if deviation < MOST_KERNEL_DEVIATION:
        return ""
    return f"this device gives different results with them: attention differs by {deviation:.0%}"


def kernel_deviation(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far the kernel is from masks in float32: the largest norm of a difference over the norm.

    Of the output and of the gradients of queries, keys and values, for random heads of that width, two of which
    look at the same keys.
    """
    layout = Layout.of([0, 9, 21, 26, 27, 40], ((9, 21, 40),))
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, 40, width, generator=random).to(device, dtype) for heads in (2, 1, 1, 2)]

    def outcome(kind: torch.dtype) -> list[Tensor]:
        q, k, v = (tensor.to(kind).requires_grad_() for tensor in drawn[:3])
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            output = shared_prefix_attention(q, k, v, layout, None, None)
            return [output.detach(), *torch.autograd.grad(output, (q, k, v), drawn[3].to(kind).transpose(1, 2))]

    found = outcome(dtype)
    with masks_only():
        expected = outcome(torch.float32)
    pairs = zip(found, expected, strict=True)
    return max(float((one.float() - other).norm() / other.norm()) for one, other in pairs)


class _Kernel(Protocol):
    """Attention over the two sets of keys; queries are [1, H, T, D], log-sum-exps [1, H, T]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]: ...
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients: ...


class _Merged(torch.autograd.Function):
    """A kernel with its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: _Kernel, scale: float) -> Tensor:
        out, lse = kernel.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.scale = kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.backward(grads[0], *ctx.saved_tensors, ctx.scale), None, None)


def _kernel(query: Tensor, value: Tensor, layout: Layout, window: int | None) -> _Kernel | None:
    """The flash kernel for these tensors, or None where only a mask will do."""
    narrow = window is not None and window < layout.longest()
    if narrow or _masks_only or query.shape[-1] != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        return _on_cpu(layout)
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        return _on_cuda(layout, query.device)
    return None


@lru_cache(maxsize=1)  # the layers of a model ask one after the other
def _on_cpu(layout: Layout) -> _OnCpu:
    return _OnCpu(layout)


@lru_cache(maxsize=1)
def _on_cuda(layout: Layout, device: torch.device) -> _OnCuda:
    return _OnCuda(layout, device)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each. out [..., D], lse [...]."""
    both = torch.logaddexp(lse, other_lse)
    one, two = ((part - both).exp().unsqueeze(-1) for part in (lse, other_lse))
    return (out * one + other * two).to(out.dtype), both


@dataclass(frozen=True)
class _Call:
    """One call of the kernel for CPUs: some queries and the keys they look at, without a prefix's."""

    queries: slice
    keys: slice
    mask: Tensor | None
    """float[1, 1, queries, keys] to be added to the scores; None for plain causal attention."""
    first: bool
    """Whether no other call has had the same keys before."""


def _calls(start: int, end: int, strip: Tensor) -> Iterator[_Call]:
    """Causal attention of a segment to itself. A long one is divided, the queries with the most keys first."""
    if end - start <= LONGEST_UNDIVIDED:
        yield _Call(slice(start, end), slice(start, end), None, first=True)
        return
    before = strip.shape[1] - QUERIES_PER_CALL
    for at in reversed(range(start, end, QUERIES_PER_CALL)):
        last = min(at + QUERIES_PER_CALL, end)
        mask = strip[: last - at, before - (at - start) : before + last - at]
        yield _Call(slice(at, last), slice(start, last), mask[None, None], first=last == end)


def _strip(before: int) -> Tensor:
    """float32[queries, before + queries]: 0 where a query sees a key, `before` of which precede the first query."""
    hidden = torch.ones(QUERIES_PER_CALL, before + QUERIES_PER_CALL, dtype=torch.bool).triu(before + 1)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


class _OnCpu:
    """PyTorch's flash attention for CPUs, several calls per segment and one per group, always computed in float32.

    Keys and values are [1, G, T, D] with H / G heads each: the kernel groups by itself, forward and backward.
    Its backward pass in bfloat16 is slow on short documents: 1,024 tokens in documents of 80, nine heads, took 20 ms
    against 5.5 ms, of 16 tokens 30 ms against 2.1 ms (one core with AVX512-BF16). It leaves out what the mask hides
    in blocks of 512 keys only: 300 tokens at once took 2.8 and 6.2 ms, 64 queries per call 1.9 and 4.1 ms.
    """

    def __init__(self, layout: Layout) -> None:
        strip = _strip(max(end - start for start, end in layout.segments))
        self._own = [call for segment in layout.segments for call in _calls(*segment, strip)]
        self._seen = [(slice(b, c), slice(a, b)) for a, b, c in layout.shared]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        dtype = q.dtype
        q, k, v = (tensor.float() for tensor in (q, k, v))
        _, heads, tokens, width = q.shape
        out = q.new_empty(1, tokens, heads, width).transpose(1, 2)
        lse = q.new_empty(1, heads, tokens, dtype=torch.float32)

        def run(queries: slice, keys: slice, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
            theirs = (tensor[:, :, keys] for tensor in (k, v))
            found: tuple[Tensor, Tensor] = flash(q[:, :, queries], *theirs, 0.0, causal, attn_mask=mask, scale=scale)
            return found

        for call in self._own:
            at = call.queries
            out[:, :, at], lse[:, :, at] = run(at, call.keys, call.mask, causal=call.mask is None)
        for own, prefix in self._seen:
            seen = run(own, prefix, None, causal=False)
            out[:, :, own], lse[:, :, own] = _merge(out[:, :, own], lse[:, :, own], *seen)
        return out.to(dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dtype = q.dtype
        grad, q, k, v, out = (tensor.float() for tensor in (grad, q, k, v, out))
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))

        def run(queries: slice, keys: slice, mask: Tensor | None, causal: bool) -> Gradients:
            mine = (tensor[:, :, queries] for tensor in (grad, q))
            theirs = (tensor[:, :, keys] for tensor in (k, v))
            whole = (out[:, :, queries], lse[:, :, queries])
            found: Gradients = flash(*mine, *theirs, *whole, 0.0, causal, attn_mask=mask, scale=scale)
            return found

        for call in self._own:
            dq[:, :, call.queries], of_keys, of_values = run(call.queries, call.keys, call.mask, call.mask is None)
            for total, part in ((dk, of_keys), (dv, of_values)):
                if call.first:
                    total[:, :, call.keys] = part
                else:
                    total[:, :, call.keys] += part
        for own, prefix in self._seen:
            of_queries, of_keys, of_values = run(own, prefix, None, causal=False)
            dq[:, :, own] += of_queries
            dk[:, :, prefix] += of_keys
            dv[:, :, prefix] += of_values
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


class _OnCuda:
    """Variable-length flash attention: one call for all segments, one for all prefixes."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        def bounds(lengths: Sequence[int]) -> Tensor:
            return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)

        def rows(spans: Sequence[Span]) -> Tensor:
            return torch.cat([torch.arange(*span) for span in spans]).to(device, non_blocking=True)

        lengths = [end - start for start, end in layout.segments]
        owns, prefixes = [c - b for _, b, c in layout.shared], [b - a for a, b, _ in layout.shared]
        self._segments = (bounds(lengths),) * 2, (max(lengths),) * 2
        self._seen = (bounds(owns), bounds(prefixes)), (max(owns), max(prefixes))
        self._own = rows([(b, c) for _, b, c in layout.shared])
        self._prefix = rows([(a, b) for a, b, _ in layout.shared])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_by_token(tensor) for tensor in (q, k, v))
        out, lse = _flash(q, k, v, *self._segments, causal=True, scale=scale)
        seen, seen_lse = _flash(q[self._own], k[self._prefix], v[self._prefix], *self._seen, causal=False, scale=scale)
        merged, both = _merge(out[self._own], lse[:, self._own].T, seen, seen_lse.T)
        out[self._own] = merged
        lse[:, self._own] = both.T
        return out.transpose(0, 1)[None], lse[None]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        grad, q, k, v, out = (_by_token(tensor) for tensor in (grad, q, k, v, out))
        own, prefix, lse = self._own, self._prefix, lse[0]
        dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, *self._segments, causal=True, scale=scale)
        of_queries, of_keys, of_values = _flash_backward(
            grad[own],
            q[own],
            k[prefix],
            v[prefix],
            out[own],
            lse[:, own].contiguous(),
            *self._seen,
            causal=False,
            scale=scale,
        )
        dq[own] += of_queries
        dk[prefix] += of_keys
        dv[prefix] += of_values
        return tuple(tensor.transpose(0, 1)[None] for tensor in (dq, dk, dv))  # type: ignore[return-value]


def _by_token(tensor: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D]."""
    return tensor[0].transpose(0, 1).contiguous()


def _flash(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], most: tuple[int, int], *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Variable-length flash attention. [T, H, D] -> [T, H, D] and log-sum-exp [H, T]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *bounds, *most, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: tuple[Tensor, Tensor],
    most: tuple[int, int],
    *,
    causal: bool,
    scale: float,
) -> Gradients:
    """Gradients of `_flash` from any output and log-sum-exp, those of a larger set of keys for instance."""
    nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the random state of a dropout that there is not
    found: Gradients = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *bounds, *most, 0.0, causal, nothing, nothing, scale=scale
    )
    return found


def _masked(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """The same with masks, a group at a time: for narrow windows, other widths of values, and devices without flash."""
    outputs = []
    for start, end, mask in _regions(layout, window, query.device):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        outputs.append(functional.scaled_dot_product_attention(q, k, v, mask, scale=scale))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _regions(layout: Layout, window: int | None, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """Parts of the row that attend to nothing outside, in order, each with its mask bool[tokens, tokens]."""
    groups = [(a, c) for a, _, c in layout.shared]
    inside = [any(a <= start < c for a, c in groups) for start, _ in layout.segments]
    alone = [span for span, grouped in zip(layout.segments, inside, strict=True) if not grouped]
    found = []
    for start, end in sorted([*groups, *alone]):
        document = torch.empty(end - start, dtype=torch.long, device=device)
        position = torch.empty_like(document)
        prefix = torch.zeros(end - start, dtype=torch.bool, device=device)
        for number, (first, last) in enumerate(layout.segments):
            if start <= first < end:
                before = layout.before(first)
                document[first - start : last - start] = number
                position[first - start : last - start] = torch.arange(before, before + last - first, device=device)
        prefix[: next((b - a for a, b, _ in layout.shared if a == start), 0)] = True
        distance = position[:, None] - position[None, :]
        together = (document[:, None] == document[None, :]) | prefix[None, :]
        near = distance < window if window is not None else torch.ones_like(together)
        found.append((start, end, together & (distance >= 0) & near))
    return found
