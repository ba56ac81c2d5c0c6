"""Attention of short sequences, padded or packed in one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_float32"
SHORT = 64  # tokens; the scores (L, L) of every head are held as they are
LIKE = 0.5  # packed sequences attend together if the shortest has at least this share of the longest's tokens
# PyTorch's kernels for a GPU except cuDNN's, which makes a plan for every new length: 1.4 ms a call on a Hopper.
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class _Places:
    """Index maps between the tokens of a packed row and groups of sequences, each padded to its longest.

    A place is a cell of a padded group, counted sequence by sequence.

    Attributes:
        groups: for each, the number of its sequences; the length that they are padded to; the token of the row in each
            place, as a slice where these are consecutive (padding has some token); and the places that are padding.
        copies: the places of each token, token after token, counted through all groups.
        firsts: for each token, where its places begin in ``copies``; None where every token has one place.
    """

    groups: list[tuple[int, int, slice | Tensor, Tensor]]
    copies: Tensor
    firsts: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[Sequence[Sequence[int]]]) -> _Places:
        """The maps for groups of sequences, each given by the indices of its tokens in the row."""
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
        """The same maps, for tensors on a device."""
        groups = [
            (count, longest, source if isinstance(source, slice) else source.to(device), padding.to(device))
            for count, longest, source, padding in self.groups
        ]
        return _Places(groups, self.copies.to(device), None if self.firsts is None else self.firsts.to(device))


def own_tokens(paths: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each sequence belong to no earlier one; in the row they come after all earlier sequences.

    Args:
        paths: for each sequence, the indices of its tokens in the row.
    """
    ends = list(accumulate((path[-1] + 1 for path in paths), max))
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


class Packing:
    """Sequences packed in one row, each of which attends only to itself.

    Sequences of similar length attend together, padded to the longest of them: the row's tokens are copied into one
    tensor (b, heads, l, d) a group, and the results copied back. A token of a shared prefix is a key of every sequence
    that has it, and a query of the first.

    Args:
        lengths: tokens of each sequence.
        paths: for each sequence, the indices of its tokens in the row, as `Layout.paths`; None: no prefix is shared,
            and the sequences follow one another.
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
        """Groups of sequences of similar length: their tokens' indices, and how many of these an earlier one has."""
        found = [(path, len(path) - own) for path, own in zip(self._paths, own_tokens(self._paths), strict=True) if own]
        order = sorted(found, key=lambda one: -len(one[0]))
        groups = []
        while order:
            bound = LIKE * len(order[0][0])
            groups.append(sorted((one for one in order if len(one[0]) >= bound), key=lambda one: one[0][-1]))
            order = [one for one in order if len(one[0]) < bound]
        return groups

    def _on(self, device: torch.device) -> tuple[_Places, _Places]:
        """The maps of queries and of keys, for tensors on a device."""
        if device not in self._placed:
            keys = _Places.of([[path for path, _ in group] for group in self._groups])
            queries = _Places.of([[path[s:] for path, s in group] for group in self._groups]) if self.shares else keys
            self._placed[device] = queries.to(device), keys.to(device)
        return self._placed[device]

    def ends(self, device: torch.device) -> Tensor:
        """Where the sequences begin, and where the last one ends, (sequences + 1,) int32. Only for sequences that share
        no prefix."""
        self._ends = self._ends.to(device)
        return self._ends

    def apart(self, row: Tensor, keys: bool = False, zero: bool = False) -> list[Tensor]:
        """Copy a row (1, heads, N, d) into one tensor (b, heads, l, d) a group, in at least float32. With ``keys`` the
        row holds keys or values, whose sequences include shared prefixes; with ``zero`` padding is zero."""
        _, heads, length, width = row.shape
        tokens = row.transpose(1, 2).reshape(length, heads * width)
        dtype = torch.float64 if row.dtype == torch.float64 else torch.float32
        parts = []
        for batch, longest, source, padding in self._on(row.device)[keys].groups:
            part = tokens[source] if isinstance(source, slice) else tokens.index_select(0, source)
            if zero and len(padding):
                part.index_fill_(0, padding, 0)
            part = part.view(batch, longest, heads, width).transpose(1, 2)
            # `to` leaves the memory order as it is where the precision stays.
            parts.append(part.to(dtype, memory_format=torch.contiguous_format).contiguous())
        return parts

    def joined(self, parts: Sequence[Tensor], length: int, dtype: torch.dtype, keys: bool = False) -> Tensor:
        """Copy the groups' tensors (b, heads, l, d) back into a row (1, heads, N, d), where N is ``length``. A token in
        several places gets the sum of them; padding of the row is zero."""
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
        """The mask that is added to a group's scores (b, K, r · L): −∞ where a key comes after the query."""
        kind = (*((group, len(key)) if self.shares else ()), query.shape[1], key.shape[1], query.dtype)
        if kind not in self._masks:
            self._masks[kind] = self._shared_mask(group, query, key) if self.shares else _causal_mask(query, key)
        return self._masks[kind]

    def _shared_mask(self, group: int, query: Tensor, key: Tensor) -> Tensor:
        members = self._groups[group]
        length = self._on(key.device)[0].groups[group][1]  # L, query tokens of a sequence
        first = torch.tensor([[shared] for _, shared in members], device=key.device)
        last = first + torch.arange(length, device=key.device)  # (b, L): the last key that a query sees
        unseen = torch.arange(key.shape[1], device=key.device)[:, None] > last[:, None]  # (b, K, L)
        mask = torch.zeros(unseen.shape, dtype=query.dtype, device=key.device).masked_fill_(unseen, -torch.inf)
        repeated = mask.repeat(1, 1, query.shape[1] // length)
        return repeated.repeat_interleave(len(key) // len(members), 0)


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """Within it, :func:`short_attention` reads a row as sequences packed in this way; None: as one sequence."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of short sequences in plain matrix products, causal or by a mask.

    It is computed in float32 and returned in the query's precision. What does not fit (longer sequences, dropout, other
    masks) goes to PyTorch's scaled dot product attention, in float32, too.

    The sequences of edits have a dozen tokens or so. PyTorch's kernel, made for long ones, takes 1.7 times as long on
    them in float32 (forward and backward, 40 sequences of 12 tokens), and its gradient eight times as long in bfloat16.
    That is on a CPU. On a GPU PyTorch's kernels are used, in the query's precision; packed sequences use its flash
    attention where that can take them.

    Args:
        query: (B, heads, L, d).
        key, value: (B, key-value heads, K, d).
        attention_mask: (B or 1, 1, L, K) bool, whether a query may see a key; None is causal, with K = L.
        others: as transformers gives them to an attention function.

    Returns:
        (B, L, heads, d), and None in place of the weights.
    """
    dtype, (batch, heads, length, width) = query.dtype, query.shape
    scale = width**-0.5 if scaling is None else scaling
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plain = not dropout and all(options.get(name) is None for name in ("position_bias", "softcap"))
    if (packing := _packing.get()) is not None:
        if not (causal and plain and key.shape[2] == length and value.shape[3] == width):
            raise ValueError("this attention is not of the kind that keeps packed sequences apart")
        if query.is_cuda and _has_packed_kernel(query, key, packing):
            return _by_packed_kernel(query, key, value, scale, packing).transpose(1, 2), None
        return _PackedAttention.apply(query, key, value, scale, packing).transpose(1, 2), None
    if query.is_cuda:
        with sdpa_kernel(PLANLESS):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
            )
    if dtype in (torch.bfloat16, torch.float16):  # one copy: in order, too
        query, key, value = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (query, key, value))
    masked = (
        attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.dim() == 4
        and attention_mask.shape[1] == 1 and key.shape[2] <= 4 * SHORT
    )  # fmt: skip
    if not ((masked or causal and key.shape[2] == length) and plain and length <= SHORT and value.shape[3] == width):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return output.to(dtype), None
    groups = key.shape[1]  # each serves heads / groups queries, whose rows make one product with it
    output = _ShortAttention.apply(
        query.reshape(batch * groups, heads // groups * length, width),
        key.reshape(batch * groups, -1, width),
        value.reshape(batch * groups, -1, width),
        scale,
        attention_mask if masked else None,
    )
    output = output.view(batch, heads, length, width).transpose(1, 2)
    return output.to(dtype).contiguous(), None


class _ShortAttention(torch.autograd.Function):
    """softmax(s · q kᵀ + mask) v with its gradient written out.

    q is (b, r · L, d), the r query heads of a key-value head one after the other; k and v are (b, K, d). A mask is
    (B or 1, 1, L, K) bool, of B sequences with b / B key-value heads each; without one the attention is causal.

    The scores are held as (b, K, r · L), keys first. PyTorch's softmax over the last axis takes ten times as long for
    a dozen numbers as for rows that fill the processor's vectors; over another axis it fills them with many queries.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None) -> Tensor:
        if seen is None:
            weights = _weights(query, key, scale, _causal_mask(query, key))
        else:
            scores = torch.bmm(key, query.mT).mul_(scale)
            batch, length = len(seen), seen.shape[2]
            # The heads of a sequence, or of all sequences where they have one mask, as (…, K, r, L).
            by_sequence = scores.view(batch, -1, key.shape[1], query.shape[1] // length, length)
            by_sequence.masked_fill_(~seen.mT.unsqueeze(3), torch.finfo(scores.dtype).min)
            weights = scores.softmax(1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.bmm(weights.mT, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        query, key, value, weights = ctx.saved_tensors
        return *_gradients(cotangent, query, key, value, weights, ctx.scale), None, None


class _PackedAttention(torch.autograd.Function):
    """Causal attention of packed sequences: query (1, heads, N, d), key and value (1, key-value heads, N, d). Each
    group (see :class:`Packing`) is computed by itself, as in :class:`_ShortAttention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Packing) -> Tensor:
        groups = key.shape[1]
        outputs, kept = [], []
        parts = packing.apart(query), packing.apart(key, keys=True), packing.apart(value, keys=True)
        for group, (q, k, v) in enumerate(zip(*parts, strict=True)):
            shape = (len(q) * groups, -1, q.shape[3])
            rows = [x.view(shape) for x in (q, k, v)]
            weights = _weights(rows[0], rows[1], scale, packing.mask(group, rows[0], rows[1]))
            outputs.append(torch.bmm(weights.mT, rows[2]).view(q.shape))
            kept += [*rows, weights]
        ctx.save_for_backward(*kept)
        ctx.scale, ctx.packing = scale, packing
        return packing.joined(outputs, query.shape[2], query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        packing, length, dtype = ctx.packing, cotangent.shape[2], cotangent.dtype
        found: list[list[Tensor]] = [[], [], []]
        for i, part in enumerate(packing.apart(cotangent, zero=True)):
            query, key, value, weights = ctx.saved_tensors[4 * i : 4 * i + 4]
            three = _gradients(part.view(query.shape), query, key, value, weights, ctx.scale)
            for parts, gradient, each in zip(found, three, (part, key, value), strict=True):
                parts.append(gradient.view(len(part), -1, *each.shape[-2:]))
        joined = (packing.joined(parts, length, dtype, keys=place > 0) for place, parts in enumerate(found))
        return *joined, None, None


def _has_packed_kernel(query: Tensor, key: Tensor, packing: Packing) -> bool:
    """Whether PyTorch's flash attention can take this row (1, heads, N, d) of packed sequences."""
    return (
        query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] % 8 == 0 and query.shape[3] <= 256
        and query.shape[1] % key.shape[1] == 0 and query.shape[2] == packing.tokens and not packing.shares
        and _packed_kernel_works(query.device, query.dtype)
    )  # fmt: skip


def _by_packed_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Packing) -> Tensor:
    """The result of :class:`_PackedAttention`, computed by PyTorch's flash attention."""
    ends, longest = packing.ends(query.device), packing.longest
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (N, heads, d)
    output = torch.ops.aten._flash_attention_forward(*rows, ends, ends, longest, longest, 0.0, True, False, scale=scale)
    return output[0].transpose(0, 1)[None]


@cache
def _packed_kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch and GPU have the kernel, and it gives the results of :class:`_PackedAttention`."""
    packing = Packing([3, 17, 9])
    numbers = torch.randn(4, 29, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    query, key, value = numbers[None], numbers[None, :2], numbers[None, 2:]
    ways: list[Callable[..., Any]] = [_by_packed_kernel, _PackedAttention.apply]
    try:
        found = []
        for attention in ways:
            leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
            with torch.enable_grad():
                output = attention(*leaves, 0.3, packing)
                found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    except torch.OutOfMemoryError:  # says nothing about the kernel, and the answer is kept
        raise
    except (AttributeError, TypeError, RuntimeError):  # no such operation, another signature, not for this GPU
        return False
    return all(bool((a - b).norm() <= 0.03 * b.norm()) for a, b in zip(*found, strict=True))


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """(L, r · L), −∞ where a key is later than the query."""
    length = key.shape[1]
    future = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).tril(-1)
    return future.repeat(1, query.shape[1] // length)


def _weights(query: Tensor, key: Tensor, scale: float, mask: Tensor) -> Tensor:
    """softmax(s · k qᵀ + mask) over the keys, (b, K, r · L); the mask may be (K, r · L)."""
    return torch.baddbmm(mask.expand(len(key), *mask.shape[-2:]), key, query.mT, alpha=scale).softmax(1)


def _gradients(
    cotangent: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given the output's."""
    for_weights = torch.bmm(value, cotangent.mT)
    for_scores = torch._softmax_backward_data(for_weights, weights, 1, weights.dtype).mul_(scale)
    return torch.bmm(for_scores.mT, key), torch.bmm(for_scores, query), torch.bmm(weights, cotangent)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """PyTorch's mask; None for packed sequences, which :class:`Packing` keeps apart."""
    return sdpa_mask(*args, **kwargs) if _packing.get() is None else None


def prefer_fast_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU or a GPU use :func:`short_attention` instead of PyTorch's attention."""
    if model.device.type in ("cpu", "cuda") and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, short_attention)
        AttentionMaskInterface.register(NAME, _mask)
        model.set_attn_implementation(NAME)
