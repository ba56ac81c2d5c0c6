"""How the passages of one forward pass are laid out in its batch: padded to one length, or packed in one row.

Passages of a dozen tokens, sorted by length and padded, make many small forward passes. Packed end to end in one row
they need no padding, and any of them can share a forward pass; only attention has to keep them apart.

A token's states depend only on itself and the tokens before it. So a shared prefix ("The capital of") is stored once
per batch: that is a tenth of the tokens of CounterFact's passages, a fifth of ZsRE's and a third of FEVER's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, chain, pairwise, takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rledit_env.lm.kernels.packing import Packing, Past, own_tokens

WORTH_SHARING = 0.95  # prefixes are shared only where that leaves at most this fraction of the tokens


@dataclass(frozen=True)
class Layout:
    """Where the passages of a forward pass are in its batch (B, L); all other tokens are padding.

    Attributes:
        lengths: tokens of each passage.
        shape: (B, L).
        packed: whether the passages are end to end in one row; otherwise each has its own row.
        paths: where prefixes are shared, the indices of each passage's tokens in that row: first those of the prefix,
            which an earlier passage has, too, then its own, which are consecutive; None means that nothing is shared.
        past: tokens that ran before, with which passages begin; paths count from the first of them.
    """

    lengths: Sequence[int]
    shape: tuple[int, int]
    packed: bool = False
    paths: Sequence[Sequence[int]] | None = None
    past: Past | None = None

    @classmethod
    def padded(cls, lengths: Sequence[int], quantum: int = 1) -> Layout:
        """A row for each passage, in the smallest batch whose tokens are a multiple of ``quantum``."""
        return cls(lengths, even_shape(len(lengths), max(lengths), quantum))

    @classmethod
    def end_to_end(cls, lengths: Sequence[int], quantum: int = 1) -> Layout:
        """One row, filled up to a multiple of ``quantum`` (see :func:`whole_quantum`)."""
        tokens = sum(lengths)
        quantum = whole_quantum(tokens, quantum)
        return cls(lengths, (1, -(-tokens // quantum) * quantum), packed=True)

    @classmethod
    def sharing(cls, rows: Sequence[Sequence[int]], weight_sets: Sequence[int], quantum: int = 1) -> Layout:
        """:meth:`end_to_end`, with each prefix that passages share in the row once.

        Args:
            rows: the passages' token ids.
            weight_sets: for each passage, the weight set that it is multiplied by; only passages of one set share
                prefixes, and they are next to each other.
            quantum: as in :meth:`end_to_end`.
        """
        places: dict[tuple[int, int], int] = {}  # (the index of the token before it, a token) → its index
        paths: list[list[int]] = []
        for row, weight_set in zip(rows, weight_sets, strict=True):
            before, path = -2 - weight_set, []  # weight sets count from −1, tokens' indices from 0
            for token in row:
                before = places.setdefault((before, token), len(places))
                path.append(before)
            paths.append(path)
        lengths = [len(row) for row in rows]
        shape = cls.end_to_end([len(places)], quantum).shape
        return cls(lengths, shape, True, None if len(places) == sum(lengths) else paths)

    @classmethod
    def heads(
        cls, rows: Sequence[Sequence[int]], counts: Sequence[int], weight_sets: Sequence[int], quantum: int = 1
    ) -> tuple[Layout, list[Sequence[int]]]:
        """:meth:`sharing` for the first ``counts[i]`` tokens of each passage, and their indices in that row. Passages
        of which no token is in the row are left out of the layout."""
        members = [i for i, count in enumerate(counts) if count]
        layout = cls.sharing([rows[i][: counts[i]] for i in members], [weight_sets[i] for i in members], quantum)
        paths = iter(layout.token_paths)
        return layout, [next(paths) if count else () for count in counts]

    @classmethod
    def tails(cls, lengths: Sequence[int], heads: Sequence[Sequence[int]], past: Past, quantum: int = 1) -> Layout:
        """The last tokens of passages, end to end, whose first ones ran before.

        Args:
            lengths: tokens of each passage, its first ones included.
            heads: for each passage, the indices of its first tokens in the row that ran before.
            past: the keys and values of that row.
            quantum: as in :meth:`end_to_end`.
        """
        own = [length - len(head) for length, head in zip(lengths, heads, strict=True)]
        starts = accumulate(own[:-1], initial=past.tokens)
        paths = [[*head, *range(start, start + n)] for head, start, n in zip(heads, starts, own, strict=True)]
        return cls(lengths, cls.end_to_end(own, quantum).shape, True, paths, past)

    @property
    def past_tokens(self) -> int:
        """Number of tokens that ran before."""
        return 0 if self.past is None else self.past.tokens

    @cached_property
    def own(self) -> list[int]:
        """Number of tokens of each passage that no earlier one has."""
        return list(self.lengths) if self.paths is None else own_tokens(self.paths, self.past_tokens)

    @cached_property
    def starts(self) -> list[int]:
        """Index of each passage's first own token in the batch, counted row by row."""
        if self.packed:
            return [0, *accumulate(self.own)][:-1]
        return [row * self.shape[1] for row in range(len(self.lengths))]

    @cached_property
    def sizes(self) -> list[int]:
        """Number of tokens from each passage's first own one to the next passage's, with padding; they sum to B · L."""
        ends = [*self.starts[1:], self.shape[0] * self.shape[1]]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @cached_property
    def packing(self) -> Packing | None:
        """What attention needs to keep the passages apart; None where each has its own row."""
        return Packing(self.lengths, self.paths, self.past) if self.packed else None

    @property
    def token_paths(self) -> Sequence[Sequence[int]]:
        """Indices of each passage's tokens in the batch, counted row by row; after a past, as in :attr:`paths`."""
        return self.paths or [range(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]

    def position_ids(self, device: torch.device) -> Tensor:
        """Position of each token in its passage, (1, L), for packed passages; 0 in padding."""
        lengths = zip(self.lengths, self.own, strict=True)
        positions = [place for length, own in lengths for place in range(length - own, length)]
        return torch.tensor([positions + [0] * (self.shape[1] - len(positions))], device=device)

    def batch(self, rows: Sequence[Tensor]) -> Tensor:
        """The batch (B, L, …) of each passage's numbers (length, …), zero in padding. Those of a shared prefix are
        taken from the first passage that has it."""
        if self.packed:
            joined = torch.cat([row[len(row) - own :] for row, own in zip(rows, self.own, strict=True)])[None]
        else:
            joined = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        missing = [size - present for size, present in zip(self.shape, joined.shape, strict=False)]
        return F.pad(joined, [0, 0] * (joined.dim() - 2) + [0, missing[1], 0, missing[0]])

    def split(self, batch: Tensor) -> list[Tensor]:
        """Each passage's part (length, …) of a batch (B, L, …), with its prefix; views where nothing is shared. Nothing
        ran before."""
        flat = batch.flatten(0, 1)
        if self.paths is not None:
            return [flat[torch.tensor(path, device=batch.device)] for path in self.paths]
        return [flat[start : start + length] for start, length in zip(self.starts, self.lengths, strict=True)]

    def places(self, positions: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Indices, among the batch's tokens, of the given positions of each passage, one passage after the other. None
        of them ran before."""
        by_passage = zip(self.token_paths, positions, strict=True)
        indices = [path[p] - self.past_tokens for path, chosen in by_passage for p in chosen]
        return torch.tensor(indices, dtype=torch.long, device=device)


def padded_on_left(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) padded on the left with ``filler``, for decoding, and their attention mask (B, L)."""
    width = max(map(len, rows))
    ids = torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def even_chunks(
    lengths: Sequence[int], max_tokens: int, weight_sets: Sequence[int], quantum: int = 1
) -> Iterator[list[int]]:
    """Indices of ``lengths`` in chunks of at most ``max_tokens`` tokens (or one passage) and about the same size.

    They are sorted by ``weight_sets``, the weight set that a passage is multiplied by, so that a chunk needs few of
    them, then by length, so that its attention has few lengths. Chunks are filled up to multiples of ``quantum``
    tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: (weight_sets[i], lengths[i]))
    yield from _cut(order, lengths, lengths, max_tokens, quantum)


def sharing_chunks(
    rows: Sequence[Sequence[int]], max_tokens: int, weight_sets: Sequence[int], quantum: int = 1
) -> Iterator[list[int]]:
    """:func:`even_chunks` of passages given as token ids, sorted so that those with a shared prefix are next to each
    other; a prefix that passages of one weight set share in a chunk counts once.

    Where too little is shared (see ``WORTH_SHARING``), these are even chunks by length.
    """
    lengths = [len(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (weight_sets[i], rows[i]))
    own_counts = list(lengths)  # tokens that each does not share with the one before it
    for before, i in pairwise(order):
        if weight_sets[before] == weight_sets[i]:
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(rows[before], rows[i], strict=False))
            own_counts[i] -= sum(1 for _ in alike)
    if sum(own_counts) > WORTH_SHARING * sum(lengths):
        yield from even_chunks(lengths, max_tokens, weight_sets, quantum)
    else:
        yield from _cut(order, lengths, own_counts, max_tokens, quantum)


def tail_chunks(
    rows: Sequence[Sequence[int]], heads: Sequence[int], max_tokens: int, weight_sets: Sequence[int], quantum: int = 1
) -> Iterator[list[int]]:
    """:func:`sharing_chunks` of passages whose first ``heads[i]`` tokens run before the others, without gradients. Of
    these each counts a quarter, and those that the passages of a chunk share count once."""
    order = sorted(range(len(rows)), key=lambda i: (weight_sets[i], rows[i][: heads[i]]))
    own_heads = list(heads)
    for before, i in pairwise(order):
        if weight_sets[before] == weight_sets[i]:
            both = zip(rows[before][: heads[before]], rows[i][: heads[i]], strict=False)
            own_heads[i] -= sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    tails = [len(row) - head for row, head in zip(rows, heads, strict=True)]
    first, then = ([max(t, n // 4) for t, n in zip(tails, counts, strict=True)] for counts in (heads, own_heads))
    yield from _cut(order, first, then, max_tokens, quantum)


def _cut(
    order: Sequence[int], first: Sequence[int], then: Sequence[int], max_tokens: int, quantum: int
) -> Iterator[list[int]]:
    """Cut the passages, in this order, into chunks.

    Passage i counts ``first[i]`` tokens where it begins a chunk, else ``then[i]``.
    """
    remaining = sum(then[i] for i in order)
    chunk: list[int] = []
    tokens, target, step = 0, 0.0, 1
    for i in order:
        is_full = tokens + then[i] > target if step > 1 else tokens + then[i] / 2 > target
        if chunk and (tokens + then[i] > max_tokens or is_full):
            yield chunk
            remaining += first[i] - then[i] - tokens
            chunk, tokens = [], 0
        if not chunk:
            target = remaining / max(1, -(-remaining // max_tokens))  # tokens per chunk
            step = whole_quantum(math.ceil(target), quantum)
            target = target if step == 1 else -(-math.ceil(target) // step) * step
        tokens += then[i] if chunk else first[i]
        chunk.append(i)
    if chunk:
        yield chunk


def whole_quantum(tokens: int, quantum: int) -> int:
    """The quantum for about so many tokens: ``quantum``, or four times that for more than 32 quanta, so that there are
    few different sizes (1 stays 1)."""
    return 4 * quantum if tokens > 32 * quantum > 32 else quantum


@cache
def even_shape(rows: int, length: int, quantum: int) -> tuple[int, int]:
    """The smallest batch (rows, length) that holds this one and whose tokens are a multiple of ``quantum`` (see
    :func:`whole_quantum`)."""
    quantum = whole_quantum(rows * length, quantum)
    shapes = [
        (-(-rows // step) * step, wide)
        for wide in range(length, length + quantum)
        for step in [quantum // math.gcd(wide, quantum)]
    ]
    return min(shapes, key=lambda shape: shape[0] * shape[1])


def cheapest_chunks(
    lengths: Sequence[int],
    max_tokens: int,
    weight_sets: Sequence[int] | None = None,
    pass_tokens: int = 64,
    quantum: int = 1,
) -> Iterator[list[int]]:
    """Indices of ``lengths`` in chunks of at most ``max_tokens`` padded tokens (or one passage), within a chunk
    sorted by ``weight_sets``, the weight set that a passage is multiplied by.

    Of all ways to cut the passages, sorted by length, into chunks, this is the one whose forward passes cost least. A
    forward pass costs its tokens, padded to :func:`even_shape`, and ``pass_tokens`` more (measured for 135M parameters
    in bfloat16 on a CPU). Passages of one length are sorted by weight set, so that a chunk needs few of them. Chunks of
    more than 32 passages are multiples of 16, which keeps the search short.
    """
    weight_sets = [0] * len(lengths) if weight_sets is None else weight_sets
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], weight_sets[i]))
    cost, first = [0], [0]  # for the first k passages: the least cost, and where its last chunk begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best, chosen = -1, end - 1
        most = min(end, max(1, max_tokens // longest))
        for size in chain(range(1, min(most, 32) + 1), range(48, most + 1, 16)):
            begin = end - size
            rows, wide = even_shape(size, longest, quantum)
            if best < 0 or cost[begin] + rows * wide < best:
                best, chosen = cost[begin] + rows * wide, begin
        cost.append(best + pass_tokens)
        first.append(chosen)
    chunks: list[list[int]] = []
    end = len(order)
    while end:
        chunks.append(sorted(order[first[end] : end], key=weight_sets.__getitem__))
        end = first[end]
    yield from reversed(chunks)
