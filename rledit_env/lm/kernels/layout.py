"""How the passages of one pass lie in its batch: padded to one length, or end to end.

Passages of a dozen tokens, padded to the longest and split by length so that padding stays small, make many small
passes. Laid end to end in one row they are all tokens, and of any number; only attention has to keep them apart.

A token's states depend on the tokens before it and on nothing else. So what several passages begin with ("The capital
of") needs to lie in the row once: a tenth of the tokens of CounterFact's passages, a fifth of ZsRE's and a third of
FEVER's are such.
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

from rledit_env.lm.kernels.packing import Packing, own_tokens

WORTH_SHARING = 0.95  # of the tokens, those that must be left for passages that begin alike to lie side by side


@dataclass(frozen=True)
class Layout:
    """Where the passages of a pass lie in its batch (B, L); what is left of it is padding.

    Attributes:
        lengths: tokens of each passage.
        shape: (B, L).
        packed: whether they lie end to end in one row; otherwise each has a row of its own.
        paths: places of each passage's tokens in that row, where passages share what they begin with: those of its
            beginning, which lies with an earlier passage, then its own, which follow each other; None where nothing is
            shared.
    """

    lengths: Sequence[int]
    shape: tuple[int, int]
    packed: bool = False
    paths: Sequence[Sequence[int]] | None = None

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
    def sharing(cls, rows: Sequence[Sequence[int]], streams: Sequence[int], quantum: int = 1) -> Layout:
        """:meth:`end_to_end`, with what passages of one stream begin with in the row once.

        Args:
            rows: the passages' token ids.
            streams: of the passages; each stream's lie side by side.
            quantum: as there.
        """
        places: dict[tuple[int, int], int] = {}  # (the place of the token before it, a token) → its place
        paths: list[list[int]] = []
        for row, stream in zip(rows, streams, strict=True):
            before, path = -2 - stream, []  # streams count from −1, and tokens' places from 0
            for token in row:
                before = places.setdefault((before, token), len(places))
                path.append(before)
            paths.append(path)
        lengths = [len(row) for row in rows]
        shape = cls.end_to_end([len(places)], quantum).shape
        return cls(lengths, shape, True, None if len(places) == sum(lengths) else paths)

    @cached_property
    def own(self) -> list[int]:
        """Tokens of each passage that lie with no earlier one."""
        return list(self.lengths) if self.paths is None else own_tokens(self.paths)

    @cached_property
    def starts(self) -> list[int]:
        """Place of each passage's first own token among the batch's tokens, counted row by row."""
        if self.packed:
            return [0, *accumulate(self.own)][:-1]
        return [row * self.shape[1] for row in range(len(self.lengths))]

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of the batch from each passage's first own to the next one's, so that they add up to the batch."""
        ends = [*self.starts[1:], self.shape[0] * self.shape[1]]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @cached_property
    def packing(self) -> Packing | None:
        """What attention has to know; None where every row is one passage."""
        return Packing(self.lengths, self.paths) if self.packed else None

    def position_ids(self, device: torch.device) -> Tensor:
        """Place of each token in its passage (1, L), of passages end to end; padding is at 0."""
        lengths = zip(self.lengths, self.own, strict=True)
        places = [place for length, own in lengths for place in range(length - own, length)]
        return torch.tensor([places + [0] * (self.shape[1] - len(places))], device=device)

    def batch(self, rows: Sequence[Tensor]) -> Tensor:
        """The batch (B, L, …) of each passage's numbers (length, …), those of :attr:`own` tokens where some are shared;
        zero elsewhere."""
        if self.packed:
            whole = torch.cat([row[len(row) - own :] for row, own in zip(rows, self.own, strict=True)])[None]
        else:
            whole = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        missing = [wanted - have for wanted, have in zip(self.shape, whole.shape, strict=False)]
        return F.pad(whole, [0, 0] * (whole.dim() - 2) + [0, missing[1], 0, missing[0]])

    def split(self, batch: Tensor) -> list[Tensor]:
        """Each passage's part (length, …) of a batch (B, L, …); views where nothing is shared."""
        flat = batch.flatten(0, 1)
        if self.paths is not None:
            return [flat[torch.tensor(path, device=batch.device)] for path in self.paths]
        return [flat[start : start + length] for start, length in zip(self.starts, self.lengths, strict=True)]

    def places(self, positions: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Where the given positions of each passage lie among the batch's tokens, one after the other."""
        tokens = self.paths or [range(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        found = [path[p] for path, chosen in zip(tokens, positions, strict=True) for p in chosen]
        return torch.tensor(found, dtype=torch.long, device=device)


def padded_on_left(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) with ``filler`` before them, for decoding, and where they are none of it, (B, L)."""
    width = max(map(len, rows))
    ids = torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def even_chunks(
    lengths: Sequence[int], max_tokens: int, streams: Sequence[int], quantum: int = 1
) -> Iterator[list[int]]:
    """Indices of ``lengths`` in chunks of at most ``max_tokens`` tokens (or one passage) and about the same size.

    They are sorted by stream, so that a chunk meets few streams' weights, then by length, so that its attention meets
    few lengths. Tokens that a multiple of ``quantum`` leaves room for are taken, too.
    """
    order = sorted(range(len(lengths)), key=lambda i: (streams[i], lengths[i]))
    yield from _cut(order, lengths, lengths, max_tokens, quantum)


def sharing_chunks(
    rows: Sequence[Sequence[int]], max_tokens: int, streams: Sequence[int], quantum: int = 1
) -> Iterator[list[int]]:
    """:func:`even_chunks` of passages given as token ids, whose tokens count once where a chunk's passages of one
    stream begin alike: those that do lie side by side.

    Where so little is shared that passages of one length in a chunk are worth more, these are even chunks by length.
    """
    lengths = [len(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (streams[i], rows[i]))
    own = list(lengths)  # tokens that each does not share with the one before it
    for before, i in pairwise(order):
        if streams[before] == streams[i]:
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(rows[before], rows[i], strict=False))
            own[i] -= sum(1 for _ in alike)
    if sum(own) > WORTH_SHARING * sum(lengths):
        yield from even_chunks(lengths, max_tokens, streams, quantum)
    else:
        yield from _cut(order, lengths, own, max_tokens, quantum)


def _cut(
    order: Sequence[int], first: Sequence[int], then: Sequence[int], max_tokens: int, quantum: int
) -> Iterator[list[int]]:
    """The passages in this order in chunks; each takes ``first`` tokens where it begins one, ``then`` where not."""
    left = sum(then[i] for i in order)
    chunk: list[int] = []
    tokens, wanted, step = 0, 0.0, 1
    for i in order:
        over = tokens + then[i] > wanted if step > 1 else tokens + then[i] / 2 > wanted
        if chunk and (tokens + then[i] > max_tokens or over):
            yield chunk
            left += first[i] - then[i] - tokens
            chunk, tokens = [], 0
        if not chunk:
            wanted = left / max(1, -(-left // max_tokens))  # tokens a chunk
            step = whole_quantum(math.ceil(wanted), quantum)
            wanted = wanted if step == 1 else -(-math.ceil(wanted) // step) * step
        tokens += then[i] if chunk else first[i]
        chunk.append(i)
    if chunk:
        yield chunk


def whole_quantum(tokens: int, quantum: int) -> int:
    """What numbers of about so many tokens are kept to multiples of: four times as much where there are more than 32
    of them, so that their different sizes stay few."""
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
    streams: Sequence[int] | None = None,
    pass_tokens: int = 64,
    quantum: int = 1,
) -> Iterator[list[int]]:
    """Indices of ``lengths`` in chunks of at most ``max_tokens`` padded tokens (or one passage), each stream's members
    side by side.

    Of the ways to cut the passages, sorted by length, into chunks, the one whose passes cost least is taken. A pass
    costs its tokens, padded to :func:`even_shape`, and as much as ``pass_tokens`` more for being one (measured with
    135M parameters in bfloat16 on a CPU). Passages of one length are sorted by stream, so that a chunk meets few
    streams' weights. Chunks of more than 32 passages are multiples of 16, which keeps the search short.
    """
    streams = [0] * len(lengths) if streams is None else streams
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], streams[i]))
    cost, first = [0], [0]  # of the first k passages: the least cost, and where the last chunk of that begins
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
        chunks.append(sorted(order[first[end] : end], key=streams.__getitem__))
        end = first[end]
    yield from reversed(chunks)
