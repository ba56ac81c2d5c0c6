"""Where sequences that lie end to end in one row attend: each to itself, those of similar length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 64  # tokens of a short sequence; the scores (L, L) of every head are held as they are
NAME = "short_float32"  # of the attention that keeps them apart, in transformers' registry
LIKE = 0.5  # packed sequences attend together whose lengths differ by no more than this factor


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a row lie in groups of sequences padded to their longest.

    Attributes:
        groups: of each, its sequences; the longest's tokens; which token of the row is in each place, as a slice where
            they follow each other, and some token in padding; and which places are padding.
        copies: token by token, its places, counted through all groups.
        firsts: where in ``copies`` each token's places begin; None where every token has one.
    """

    groups: list[tuple[int, int, slice | Tensor, Tensor]]
    copies: Tensor
    firsts: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[Sequence[Sequence[int]]]) -> _Places:
        """Of groups of sequences, given as the places of their tokens in the row."""
        found: list[tuple[int, int, slice | Tensor, Tensor]] = []
        tokens, held = [], []
        for members in groups:
            longest = max(map(len, members))
            source = torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in members]).flatten()
            own = (torch.arange(longest) < torch.tensor([[len(row)] for row in members])).flatten()
            begin, end = int(source[0]), int(source[-1]) + 1
            whole = bool(own.all()) and end - begin == len(source)
            found.append((len(members), longest, slice(begin, end) if whole else source, (~own).nonzero()[:, 0]))
            tokens.append(source)
            held.append(own)
        places = torch.cat(held).nonzero()[:, 0]
        theirs = torch.cat(tokens)[places]
        counts = theirs.bincount()
        firsts = counts.cumsum(0) - counts
        return cls(found, places[theirs.argsort(stable=True)], None if len(counts) == len(places) else firsts)

    def to(self, device: torch.device) -> _Places:
        """The same for tensors of a device."""
        groups = [
            (count, longest, source if isinstance(source, slice) else source.to(device), padding.to(device))
            for count, longest, source, padding in self.groups
        ]
        return _Places(groups, self.copies.to(device), None if self.firsts is None else self.firsts.to(device))


def own_tokens(paths: Sequence[Sequence[int]]) -> list[int]:
    """How many of each sequence's tokens lie with no earlier one; they follow, in the row, all that lies before them.

    Args:
        paths: places of each sequence's tokens in the row.
    """
    ends = list(accumulate((path[-1] + 1 for path in paths), max))
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


class Packing:
    """Sequences that lie end to end in one row, and attend each to itself.

    Those of similar length attend together, padded to the longest of them: the row's tokens are put in their place
    in (b, heads, l, d) and taken from there again. A token that several sequences begin with is a key of each of them,
    and a query of the first.

    Args:
        lengths: of the sequences, in their order.
        paths: places of each sequence's tokens in the row, as `Layout.paths`; None: one after the other.
    """

    def __init__(self, lengths: Sequence[int], paths: Sequence[Sequence[int]] | None = None) -> None:
        starts = [0, *accumulate(lengths)]
        self.longest, self.shares = max(lengths), paths is not None
        self.tokens = starts[-1] if paths is None else 1 + max(path[-1] for path in paths)
        self._ends = torch.tensor(starts, dtype=torch.int32)
        self._paths = paths or [range(begin, end) for begin, end in pairwise(starts)]
        self._placed: dict[torch.device, tuple[_Places, _Places]] = {}
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    @cached_property
    def _groups(self) -> list[list[tuple[Sequence[int], int]]]:
        """Groups of sequences of similar length: the places of their tokens, and how many of these are another's."""
        found = [(path, len(path) - own) for path, own in zip(self._paths, own_tokens(self._paths), strict=True) if own]
        order = sorted(found, key=lambda one: -len(one[0]))
        groups = []
        while order:
            bound = LIKE * len(order[0][0])
            groups.append(sorted((one for one in order if len(one[0]) >= bound), key=lambda one: one[0][-1]))
            order = [one for one in order if len(one[0]) < bound]
        return groups

    def _on(self, device: torch.device) -> tuple[_Places, _Places]:
        """Where queries and keys lie, for tensors of a device."""
        if device not in self._placed:
            keys = _Places.of([[path for path, _ in group] for group in self._groups])
            queries = _Places.of([[path[s:] for path, s in group] for group in self._groups]) if self.shares else keys
            self._placed[device] = queries.to(device), keys.to(device)
        return self._placed[device]

    def ends(self, device: torch.device) -> Tensor:
        """Where the sequences begin, and where the last one ends, (sequences + 1,) int32; of sequences that share
        nothing."""
        self._ends = self._ends.to(device)
        return self._ends

    def apart(self, row: Tensor, keys: bool = False, zero: bool = False) -> list[Tensor]:
        """Of each group, (b, heads, l, d) in at least float32, of a row (1, heads, N, d) of queries or keys; padding is
        zero if asked for, and some number otherwise."""
        _, heads, length, width = row.shape
        tokens = row.transpose(1, 2).reshape(length, heads * width)
        dtype = torch.float64 if row.dtype == torch.float64 else torch.float32
        parts = []
        for batch, longest, source, padding in self._on(row.device)[keys].groups:
            part = tokens[source] if isinstance(source, slice) else tokens.index_select(0, source)
            if zero and len(padding):
                part.index_fill_(0, padding, 0)
            part = part.view(batch, longest, heads, width).transpose(1, 2)
            # Where the precision stays, `to` leaves the order, too.
            parts.append(part.to(dtype, memory_format=torch.contiguous_format).contiguous())
        return parts

    def joined(self, parts: Sequence[Tensor], length: int, dtype: torch.dtype, keys: bool = False) -> Tensor:
        """The row (1, heads, N, d) of the groups' (b, heads, l, d), zero in its padding; N is ``length``. A token that
        is in several places is their sum."""
        _, heads, _, width = parts[0].shape
        places = self._on(parts[0].device)[keys]
        precision = dtype if places.firsts is None else parts[0].dtype
        rows = [part.transpose(1, 2).to(precision).reshape(-1, heads * width) for part in parts]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        tokens = whole.new_empty(length, heads * width, dtype=dtype)
        if places.firsts is None:
            torch.index_select(whole, 0, places.copies, out=tokens[: self.tokens])
        else:
            tokens[: self.tokens] = F.embedding_bag(places.copies, whole, places.firsts, mode="sum")
        tokens[self.tokens :] = 0
        return tokens.view(1, length, heads, width).transpose(1, 2)

    def mask(self, group: int, query: Tensor, key: Tensor) -> Tensor:
        """What is added to the scores (b, K, r · L) of a group: −∞ where a key is later than the query."""
        kind = (*((group, len(key)) if self.shares else ()), query.shape[1], key.shape[1], query.dtype)
        if kind not in self._masks:
            self._masks[kind] = self._shared_mask(group, query, key) if self.shares else causal_mask(query, key)
        return self._masks[kind]

    def _shared_mask(self, group: int, query: Tensor, key: Tensor) -> Tensor:
        members = self._groups[group]
        length = self._on(key.device)[0].groups[group][1]  # queries of a sequence, of r heads
        first = torch.tensor([[shared] for _, shared in members], device=key.device)
        last = first + torch.arange(length, device=key.device)  # (b, L): the last key that a query sees
        unseen = torch.arange(key.shape[1], device=key.device)[:, None] > last[:, None]  # (b, K, L)
        mask = torch.zeros(unseen.shape, dtype=query.dtype, device=key.device).masked_fill_(unseen, -torch.inf)
        repeated = mask.repeat(1, 1, query.shape[1] // length)
        return repeated.repeat_interleave(len(key) // len(members), 0)


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


def current_packing() -> Packing | None:
    """How the sequences lie in the row that now runs; None where every row is one sequence."""
    return _packing.get()


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """Within it, `rledit_env.lm.kernels.attention.short_attention` takes a row for sequences that lie so in it."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """(L, r · L), −∞ where a key is later than the query."""
    length = key.shape[1]
    future = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).tril(-1)
    return future.repeat(1, query.shape[1] // length)
