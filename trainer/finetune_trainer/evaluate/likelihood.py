"""Log-probabilities of given answers: closed label sets, multiple choice, and whole documents.

A closed set is scored in one forward pass per batch: the candidates of a row hang below its prompt as a tree of
tokens (shared beginnings once, end tokens never fed in), kept apart by the attention mask, and what all prompts
begin with is computed once and kept in the key-value cache. `sequence_scores` is the plain way, one sequence a
candidate; it is used where a model does not take such masks, and to check that both ways agree.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from finetune_trainer.data.prefixes import LEAST_SHARED_PREFIX, common_length

RowsDone = Callable[[int], None]


@dataclass(frozen=True)
class Budget:
    """What one batch may hold."""

    tokens: int = 2048
    """Tokens fed in, padding included."""
    logits: int = 64_000_000
    """Values of the logits: rows × positions × vocabulary."""


@dataclass(frozen=True)
class ClosedQuestion:
    """A prompt with its candidates, each with the end token."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TargetSequence:
    """Tokens with (position, target) pairs; the position is that of the hidden state which predicts the target."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class SequenceScore:
    """Log-probability of each target, and how many were the most probable token."""

    log_probabilities: tuple[float, ...]
    right: int

    @property
    def sum(self) -> float:
        return sum(self.log_probabilities)


@dataclass(frozen=True)
class Tree:
    """Candidates merged where they begin alike. Node n is column n + 1 after the prompt's last token (column 0)."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    """Column of each node's parent; always smaller than the node's own."""
    depths: tuple[int, ...]
    """1 for the tokens right after the prompt."""
    edges: tuple[tuple[int, int], ...]
    """(column that predicts, token predicted), each once."""
    paths: tuple[tuple[int, ...], ...]
    """For each candidate the indices of its edges."""


@lru_cache(maxsize=4096)
def tree_of(candidates: tuple[tuple[int, ...], ...]) -> Tree:
    """Merge the candidates; a token that ends every candidate it is in is only predicted, never fed in."""
    columns: dict[tuple[int, ...], int] = {(): 0}
    edges: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    paths = []
    inner = {candidate[:end] for candidate in candidates for end in range(1, len(candidate))}
    for candidate in candidates:
        path = []
        for end in range(1, len(candidate) + 1):
            before, here = candidate[: end - 1], candidate[:end]
            path.append(edges.setdefault((columns[before], here[-1]), len(edges)))
            if here in inner and here not in columns:
                columns[here] = len(columns)
                tokens.append(here[-1])
                parents.append(columns[before])
        paths.append(tuple(path))
    depths = [len(prefix) for prefix in columns if prefix]
    return Tree(tuple(tokens), tuple(parents), tuple(depths), tuple(edges), tuple(paths))


# -- closed label sets ------------------------------------------------------------------------------------------


@torch.inference_mode()
def tree_scores(
    model: Any, rows: Sequence[ClosedQuestion], budget: Budget = Budget(), done: RowsDone = lambda _rows: None
) -> list[list[float]]:
    """Summed log-probability of every candidate of every row, in the order of `rows`."""
    if not rows:
        return []
    shared = _shared_prefix([row.prompt for row in rows])
    cache = _prefix_cache(model, rows[0].prompt[:shared]) if shared else None
    vocabulary = model.config.get_text_config().vocab_size
    sizes = [(len(row.prompt) - shared, len(tree_of(row.candidates).tokens)) for row in rows]
    results: list[list[float]] = [[] for _ in rows]

    def fits(count: int, suffix: int, nodes: int) -> bool:
        small = count * (suffix + nodes) <= budget.tokens and count * (nodes + 1) * vocabulary <= budget.logits
        return count == 1 or small

    for batch in batches_by_size(sizes, fits):
        scores = with_half_batches(batch, lambda part: _tree_batch(model, [rows[i] for i in part], shared, cache))
        for index, values in zip(batch, scores, strict=True):
            results[index] = values
        done(len(batch))
    return results


def _shared_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own; 0 where it would not pay."""
    if len(prompts) < 2:
        return 0
    length = common_length(min(prompts), max(prompts))  # what the first and the last in order share, all share
    length = min(length, min(len(prompt) for prompt in prompts) - 1)
    return length if length >= LEAST_SHARED_PREFIX else 0


def _prefix_cache(model: Any, prefix: tuple[int, ...]) -> Any:
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _tree_batch(model: Any, rows: Sequence[ClosedQuestion], shared: int, cache: Any) -> list[list[float]]:
    """One forward pass: prompts padded on the left so that all trees begin at the same column."""
    trees = [tree_of(row.candidates) for row in rows]
    suffix = max(len(row.prompt) for row in rows) - shared
    nodes = max(len(tree.tokens) for tree in trees)
    width = suffix + nodes
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    visible = torch.zeros(len(rows), width, shared + width, dtype=torch.bool)
    for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        own = row.prompt[shared:]
        first, end = suffix - len(own), suffix + len(tree.tokens)
        ids[b, first:end] = torch.tensor([*own, *tree.tokens])
        positions[b, first:suffix] = torch.arange(shared, len(row.prompt))
        positions[b, suffix:end] = torch.tensor(tree.depths, dtype=torch.long) + len(row.prompt) - 1
        visible[b, :, :shared] = True
        visible[b, first:end, shared + first : shared + suffix] = True
        visible[b, first:suffix, shared + first : shared + suffix].tril_()
        visible[b, suffix:end, shared + suffix : shared + end] = _ancestors(tree)
        # Padding sees at least itself: a row of the mask without any True makes the softmax undefined.
        visible[b, range(width), range(shared, shared + width)] = True
    past = copy.deepcopy(cache) if cache is not None else None
    if past is not None and len(rows) > 1:
        past.batch_repeat_interleave(len(rows))
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=_additive(visible, model),
        position_ids=positions.to(model.device),
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=nodes + 1,
    )
    return [_candidate_sums(logits, tree) for logits, tree in zip(output.logits, trees, strict=True)]


@lru_cache(maxsize=4096)
def _ancestors(tree: Tree) -> torch.Tensor:
    """bool[nodes, nodes]: which nodes each node sees, itself among them."""
    sees = torch.eye(len(tree.tokens), dtype=torch.bool)
    for node, parent in enumerate(tree.parents):
        if parent > 0:
            sees[node] |= sees[parent - 1]
    return sees


def _additive(visible: torch.Tensor, model: Any) -> torch.Tensor:
    """The mask as every attention implementation takes it: float[rows, 1, queries, keys], 0 or the lowest value."""
    mask = torch.zeros(visible.shape, dtype=model.dtype)
    mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
    return mask[:, None].to(model.device)


def _candidate_sums(logits: torch.Tensor, tree: Tree) -> list[float]:
    """Scores of one row from its logits, [columns, vocabulary]."""
    columns, tokens = torch.tensor(tree.edges, device=logits.device).T
    used = logits[: len(tree.tokens) + 1].float()
    edges = (used[columns, tokens] - used.logsumexp(dim=-1)[columns]).double().cpu()
    return [float(edges[list(path)].sum()) for path in tree.paths]


# -- the plain way ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def sequence_scores(
    model: Any, sequences: Sequence[TargetSequence], budget: Budget = Budget(), done: RowsDone = lambda _rows: None
) -> list[SequenceScore]:
    """Log-probabilities of the targets of every sequence, in the order given: padded on the right, no cache."""
    vocabulary = model.config.get_text_config().vocab_size
    results: list[SequenceScore] = [SequenceScore((), 0)] * len(sequences)

    def fits(count: int, length: int, _: int) -> bool:
        return count == 1 or (count * length <= budget.tokens and count * length * vocabulary <= budget.logits)

    for batch in batches_by_size([(len(s.ids), 0) for s in sequences], fits):
        scores = with_half_batches(batch, lambda part: _sequence_batch(model, [sequences[i] for i in part]))
        for index, scored in zip(batch, scores, strict=True):
            results[index] = scored
        done(len(batch))
    return results


def _sequence_batch(model: Any, sequences: Sequence[TargetSequence]) -> list[SequenceScore]:
    width = max(len(s.ids) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        ids[b, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[b, : len(sequence.ids)] = 1
    wanted = sorted({position for sequence in sequences for position in sequence.positions})
    column = {position: index for index, position in enumerate(wanted)}
    arguments = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    if _keeps_chosen_logits(model):
        logits = model(**arguments, logits_to_keep=torch.tensor(wanted, device=model.device)).logits
    else:
        # Virtual tokens of a soft prompt stand in front and have logits of their own.
        logits = model(**arguments).logits[:, -width:][:, wanted]
    return [_targets_of(logits[b], s, [column[p] for p in s.positions]) for b, s in enumerate(sequences)]


def _targets_of(logits: torch.Tensor, sequence: TargetSequence, columns: list[int]) -> SequenceScore:
    if not columns:
        return SequenceScore((), 0)
    used = logits[columns].float()
    targets = torch.tensor(sequence.targets, device=logits.device)
    chosen = used.gather(1, targets[:, None]).squeeze(1) - used.logsumexp(dim=-1)
    right = int((used.argmax(dim=-1) == targets).sum())
    return SequenceScore(tuple(chosen.double().cpu().tolist()), right)


def _keeps_chosen_logits(model: Any) -> bool:
    if has_virtual_tokens(model):
        return False
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def has_virtual_tokens(model: Any) -> bool:
    """Whether an active soft prompt or prefix stands before the input: masks of our own would miss it."""
    from peft import PeftModel

    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def as_sequences(row: ClosedQuestion) -> list[TargetSequence]:
    """Prompt and candidate as one sequence for each candidate."""
    start = len(row.prompt) - 1
    return [TargetSequence(row.prompt + c[:-1], tuple(range(start, start + len(c))), c) for c in row.candidates]


def plain_scores(
    model: Any, rows: Sequence[ClosedQuestion], budget: Budget = Budget(), done: RowsDone = lambda _rows: None
) -> list[list[float]]:
    """What `tree_scores` gives, one sequence per candidate."""
    sequences = [sequence for row in rows for sequence in as_sequences(row)]
    flat = iter(sequence_scores(model, sequences, budget))
    results = [[next(flat).sum for _ in row.candidates] for row in rows]
    done(len(rows))
    return results


def tree_disagreement(model: Any, rows: Sequence[ClosedQuestion]) -> float:
    """Largest difference between both ways on a few candidates of the first rows; infinite where trees fail."""
    few = [ClosedQuestion(row.prompt, row.candidates[:4]) for row in rows[:2]]
    try:
        fast = tree_scores(model, few)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return float("inf")
    plain = plain_scores(model, few)
    return max((abs(a - b) for x, y in zip(fast, plain, strict=True) for a, b in zip(x, y, strict=True)), default=0.0)


# -- batches ----------------------------------------------------------------------------------------------------


def batches_by_size(sizes: Sequence[tuple[int, int]], fits: Callable[[int, int, int], bool]) -> Iterator[list[int]]:
    """Indices in batches of similar size, the largest first so that lack of memory shows at once.

    `fits(count, first, second)`: whether `count` rows padded to those sizes may go together.
    """
    batch: list[int] = []
    first = second = 0
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        new_first, new_second = max(first, sizes[index][0]), max(second, sizes[index][1])
        if batch and not fits(len(batch) + 1, new_first, new_second):
            yield batch
            batch, (new_first, new_second) = [], sizes[index]
        batch.append(index)
        first, second = new_first, new_second
    if batch:
        yield batch


def with_half_batches(batch: list[int], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
    """`compute` on the batch, or on its halves where the GPU's memory does not suffice."""
    try:
        return compute(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return with_half_batches(batch[:middle], compute) + with_half_batches(batch[middle:], compute)
