"""Packed sequences: several sequences in one row, whose tokens attend only to their own sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 64  # most tokens of a short sequence, whose scores (L, L) are stored for every head
NAME = "short_float32"  # the name of `short_attention` in transformers' registry
LIKE = 0.5  # a group's shortest sequence has at least this fraction of the longest one's tokens


@dataclass(frozen=True)
class _Places:
    """Index maps between the tokens of a packed row and groups of sequences, each padded to its longest.

    A place is a cell of a padded group, counted sequence by sequence.

    Attributes:
        groups: for each group, the number of its sequences; the length that they are padded to; the index of the row's
            token in each place, as a slice where these are consecutive (padding has any token); and the places of the
            padding.
        copies: the places of the first token, then of the second, and so on, counted through all groups.
        firsts: for each token, the index in ``copies`` of its first place; None where every token has one place.
    """

    groups: list[tuple[int, int, slice | Tensor, Tensor]]
    copies: Tensor
    firsts: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[Sequence[Sequence[int]]]) -> _Places:
        """The maps for groups of sequences, each given by the indices of its tokens in the row."""
        maps: list[tuple[int, int, slice | Tensor, Tensor]] = []
        sources, masks = [], []
        for members in groups:
            longest = max(map(len, members))
            source = torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in members]).flatten()
            is_token = (torch.arange(longest) < torch.tensor([[len(row)] for row in members])).flatten()
            begin, end = int(source[0]), int(source[-1]) + 1
            is_consecutive = bool(is_token.all()) and torch.equal(source, torch.arange(begin, end))
            where = slice(begin, end) if is_consecutive else source
            maps.append((len(members), longest, where, (~is_token).nonzero()[:, 0]))
            sources.append(source)
            masks.append(is_token)
        places = torch.cat(masks).nonzero()[:, 0]
        tokens = torch.cat(sources)[places]
        counts = tokens.bincount()
        firsts = counts.cumsum(0) - counts
        return cls(maps, places[tokens.argsort(stable=True)], None if len(counts) == len(places) else firsts)

    def to(self, device: torch.device) -> _Places:
        """The same maps, for tensors on a device."""
        groups = [
            (count, longest, source if isinstance(source, slice) else source.to(device), padding.to(device))
            for count, longest, source, padding in self.groups
        ]
        return _Places(groups, self.copies.to(device), None if self.firsts is None else self.firsts.to(device))


def own_tokens(paths: Sequence[Sequence[int]], past_tokens: int = 0) -> list[int]:
    """Number of tokens of each sequence that no earlier one has; in the row they come after all earlier sequences.

    Args:
        paths: for each sequence, the indices of its tokens, counted from the first token of the past, if there is one.
        past_tokens: number of tokens of the past.
    """
    ends = list(accumulate((path[-1] + 1 for path in paths), max))
    return [end - begin for begin, end in zip([past_tokens, *ends], ends, strict=False)]


class Past:
    """Keys and values of a row of tokens that ran before, layer by layer, to which a later row's tokens attend.

    Args:
        tokens: number of tokens, without padding.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a layer's keys and values (1, key-value heads, N, d), without their padding."""
        self._rows[layer] = key[:, :, : self.tokens], value[:, :, : self.tokens]

    def followed_by(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """A later row's keys and values with the past's in front of them."""
        return [torch.cat(rows, dim=2) for rows in zip(self._rows[layer], (key, value), strict=True)]


class Packing:
    """Sequences packed in one row, whose tokens attend only to their own sequence.

    Sequences of similar length form a group and are padded to the longest of them. The row's tokens are copied into one
    tensor (b, heads, l, d) per group, and the results are copied back. A token of a shared prefix is a key of every
    sequence that has it, and a query of the first one only.

    Args:
        lengths: tokens of each sequence.
        paths: for each sequence, the indices of its tokens in the row, as `Layout.paths`; None means that no prefix
            is shared, and the sequences follow one another.
        past: tokens before the row, whose keys and values are known; paths count from the first of them.

    Attributes:
        written: where the row's own keys and values are kept, for rows that run later; None: nowhere.
    """

    def __init__(
        self, lengths: Sequence[int], paths: Sequence[Sequence[int]] | None = None, past: Past | None = None
    ) -> None:
        starts = [0, *accumulate(lengths)]
        self.longest, self.shares = max(lengths), paths is not None
        self.past, self.past_tokens = past, 0 if past is None else past.tokens
        self.written: Past | None = None
        self.tokens = starts[-1] if paths is None else 1 + max(path[-1] for path in paths) - self.past_tokens
        self._ends = torch.tensor(starts, dtype=torch.int32)
        self._paths = paths or [range(begin, end) for begin, end in pairwise(starts)]
        self._placed: dict[torch.device, tuple[_Places, _Places]] = {}
        self._masks: dict[tuple[object, ...], Tensor] = {}

    @cached_property
    def _groups(self) -> list[list[tuple[Sequence[int], int]]]:
        """Groups of sequences of similar length: the indices of each one's tokens, and how many an earlier one has."""
        own_counts = own_tokens(self._paths, self.past_tokens)
        sequences = [(path, len(path) - own) for path, own in zip(self._paths, own_counts, strict=True) if own]
        order = sorted(sequences, key=lambda sequence: -len(sequence[0]))
        groups = []
        while order:
            bound = LIKE * len(order[0][0])
            members = [sequence for sequence in order if len(sequence[0]) >= bound]
            groups.append(sorted(members, key=lambda sequence: sequence[0][-1]))
            order = [sequence for sequence in order if len(sequence[0]) < bound]
        return groups

    def _places_on(self, device: torch.device) -> tuple[_Places, _Places]:
        """The maps of queries and of keys, for tensors on a device."""
        if device not in self._placed:
            keys = _Places.of([[path for path, _ in group] for group in self._groups])
            own = [[[index - self.past_tokens for index in path[s:]] for path, s in group] for group in self._groups]
            queries = _Places.of(own) if self.shares else keys
            self._placed[device] = queries.to(device), keys.to(device)
        return self._placed[device]

    def ends(self, device: torch.device) -> Tensor:
        """The start of each sequence and the end of the last one, (sequences + 1,) int32; not valid where prefixes are
        shared."""
        self._ends = self._ends.to(device)
        return self._ends

    def apart(self, row: Tensor, keys: bool = False, zero: bool = False) -> list[Tensor]:
        """Copy a row (1, heads, N, d) into one tensor (b, heads, l, d) per group, in at least float32.

        With ``keys`` the row has keys or values, whose sequences include shared prefixes and the past; with ``zero``
        padding is 0.
        """
        _, heads, length, width = row.shape
        tokens = row.transpose(1, 2).reshape(length, heads * width)
        dtype = torch.float64 if row.dtype == torch.float64 else torch.float32
        parts = []
        for batch, longest, source, padding in self._places_on(row.device)[keys].groups:
            part = tokens[source] if isinstance(source, slice) else tokens.index_select(0, source)
            if zero and len(padding):
                part.index_fill_(0, padding, 0)
            part = part.view(batch, longest, heads, width).transpose(1, 2)
            # `to` leaves the memory order as it is where the precision stays.
            parts.append(part.to(dtype, memory_format=torch.contiguous_format).contiguous())
        return parts

    def joined(self, parts: Sequence[Tensor], length: int, dtype: torch.dtype, keys: bool = False) -> Tensor:
        """Copy the groups' tensors (b, heads, l, d) back into a row (1, heads, N, d), where N is ``length``.

        A token in several places gets their sum; padding of the row is zero.
        """
        _, heads, _, width = parts[0].shape
        places = self._places_on(parts[0].device)[keys]
        precision = dtype if places.firsts is None else parts[0].dtype
        rows = [part.transpose(1, 2).to(precision).reshape(-1, heads * width) for part in parts]
        all_rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        tokens = all_rows.new_empty(length, heads * width, dtype=dtype)
        count = self.tokens + (self.past_tokens if keys else 0)
        if places.firsts is None:
            torch.index_select(all_rows, 0, places.copies, out=tokens[:count])
        else:
            tokens[:count] = F.embedding_bag(places.copies, all_rows, places.firsts, mode="sum")
        tokens[count:] = 0
        return tokens.view(1, length, heads, width).transpose(1, 2)

    def mask(self, group: int, query: Tensor, key: Tensor) -> Tensor:
        """The mask that is added to a group's scores (b, K, r · L): −∞ where a key comes after the query."""
        kind = (*((group, len(key)) if self.shares else ()), query.shape[1], key.shape[1], query.dtype)
        if kind not in self._masks:
            self._masks[kind] = self._shared_mask(group, query, key) if self.shares else causal_mask(query, key)
        return self._masks[kind]

    def _shared_mask(self, group: int, query: Tensor, key: Tensor) -> Tensor:
        members = self._groups[group]
        length = self._places_on(key.device)[0].groups[group][1]  # L, query tokens of a sequence
        first = torch.tensor([[shared] for _, shared in members], device=key.device)
        last = first + torch.arange(length, device=key.device)  # (b, L): the last key that a query sees
        unseen = torch.arange(key.shape[1], device=key.device)[:, None] > last[:, None]  # (b, K, L)
        mask = torch.zeros(unseen.shape, dtype=query.dtype, device=key.device).masked_fill_(unseen, -torch.inf)
        repeated = mask.repeat(1, 1, query.shape[1] // length)
        return repeated.repeat_interleave(len(key) // len(members), 0)


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


def current_packing() -> Packing | None:
    """The packing of the row that is running; None where every row is one sequence."""
    return _packing.get()


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """Context in which `rledit_env.lm.kernels.attention.short_attention` treats a row as packed sequences; for None, as
    one sequence."""
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
