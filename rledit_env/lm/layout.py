"""How the passages of one pass lie in its batch: padded to one length, or end to end.

Passages of a dozen tokens, padded to the longest and split by length so that padding stays small, make many small
passes. Laid end to end in one row they are all tokens, and of any number; only attention has to keep them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rledit_env.lm.attention import Packing


@dataclass(frozen=True)
class Layout:
    """Where the passages of a pass lie in its batch (B, L); what is left of it is padding.

    Attributes:
        lengths: tokens of each passage.
        shape: (B, L).
        packed: whether they lie end to end in one row; otherwise each has a row of its own.
    """

    lengths: Sequence[int]
    shape: tuple[int, int]
    packed: bool = False

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

    @cached_property
    def starts(self) -> list[int]:
        """Place of each passage's first token among the batch's tokens, counted row by row."""
        if self.packed:
            return [0, *accumulate(self.lengths)][:-1]
        return [row * self.shape[1] for row in range(len(self.lengths))]

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of the batch from each passage's first to the next one's, so that they add up to the batch."""
        ends = [*self.starts[1:], self.shape[0] * self.shape[1]]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @cached_property
    def packing(self) -> Packing | None:
        """What attention has to know; None where every row is one passage."""
        return Packing(self.lengths) if self.packed else None

    def position_ids(self, device: torch.device) -> Tensor:
        """Place of each token in its passage (1, L), of passages end to end; padding is at 0."""
        places = [place for length in self.lengths for place in range(length)]
        return torch.tensor([places + [0] * (self.shape[1] - len(places))], device=device)

    def batch(self, rows: Sequence[Tensor]) -> Tensor:
        """The batch (B, L, …) of the passages' own numbers (length, …), zero elsewhere."""
        whole = torch.cat(list(rows))[None] if self.packed else nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        missing = [wanted - have for wanted, have in zip(self.shape, whole.shape, strict=False)]
        return F.pad(whole, [0, 0] * (whole.dim() - 2) + [0, missing[1], 0, missing[0]])

    def split(self, batch: Tensor) -> list[Tensor]:
        """Views (length, …) of each passage's part of a batch (B, L, …)."""
        flat = batch.flatten(0, 1)
        return [flat[start : start + length] for start, length in zip(self.starts, self.lengths, strict=True)]

    def places(self, positions: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Where the given positions of each passage lie among the batch's tokens, one after the other."""
        found = [start + p for start, chosen in zip(self.starts, positions, strict=True) for p in chosen]
        return torch.tensor(found, dtype=torch.long, device=device)


def even_chunks(lengths: Sequence[int], max_tokens: int, streams: Sequence[int]) -> Iterator[list[int]]:
    """Indices of ``lengths`` in chunks of at most ``max_tokens`` tokens (or one passage) and about the same size.

    They are sorted by stream, so that a chunk meets few streams' weights, then by length, so that its attention meets
    few lengths.
    """
    order = sorted(range(len(lengths)), key=lambda i: (streams[i], lengths[i]))
    left = sum(lengths)
    wanted = left / max(1, -(-left // max_tokens))  # tokens a chunk
    chunk: list[int] = []
    tokens = 0
    for i in order:
        if chunk and (tokens + lengths[i] > max_tokens or tokens + lengths[i] / 2 > wanted):
            yield chunk
            left -= tokens
            wanted = left / max(1, -(-left // max_tokens))
            chunk, tokens = [], 0
        chunk.append(i)
        tokens += lengths[i]
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
