"""Attention of short sequences, padded or end to end in one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_float32"
SHORT = 64  # tokens; the scores (L, L) of every head are held as they are
LIKE = 0.5  # packed sequences attend together whose lengths differ by no more than this factor
# PyTorch's kernels for a GPU but cuDNN's, which plans for every new length anew: 1.4 ms a call on a Hopper.
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Group = tuple[int, int, slice | Tensor, Tensor]  # sequences, the longest's tokens, where they lie, what is padding


class Packing:
    """Sequences that lie end to end in one row, and attend each to itself.

    Those of similar length attend together, padded to the longest of them: the row's tokens are put in their place
    in (b, heads, l, d) and taken from there again.

    Args:
        lengths: of the sequences, in their order.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        starts = [0, *accumulate(lengths)]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self.tokens, self.longest = starts[-1], max(lengths)
        self._ends = torch.tensor(starts, dtype=torch.int32)
        groups: list[Group] = []
        back = torch.zeros(self.tokens, dtype=torch.long)
        place = 0
        while order:
            longest = lengths[order[0]]
            members = sorted(i for i in order if lengths[i] >= LIKE * longest)
            order = [i for i in order if lengths[i] < LIKE * longest]
            first = torch.tensor([starts[i] for i in members])[:, None]
            own = torch.arange(longest) < torch.tensor([lengths[i] for i in members])[:, None]
            source = torch.where(own, first + torch.arange(longest), first).flatten()
            padding = (~own).flatten().nonzero()[:, 0]
            places = place + own.flatten().nonzero()[:, 0]
            back[source[places - place]] = places
            whole = not len(padding) and int(source[-1] - source[0]) == len(source) - 1
            groups.append(
                (len(members), longest, slice(int(source[0]), int(source[-1]) + 1) if whole else source, padding)
            )
            place += len(source)
        self._placed = {torch.device("cpu"): (groups, back)}
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def _on(self, device: torch.device) -> tuple[list[Group], Tensor]:
        """The groups, and where each token lies in them, for tensors of a device."""
        if device not in self._placed:
            groups, back = self._placed[torch.device("cpu")]
            moved = [
                (count, longest, source if isinstance(source, slice) else source.to(device), padding.to(device))
                for count, longest, source, padding in groups
            ]
            self._placed[device] = moved, back.to(device)
        return self._placed[device]

    def ends(self, device: torch.device) -> Tensor:
        """Where the sequences begin, and where the last one ends, (sequences + 1,) int32."""
        self._ends = self._ends.to(device)
        return self._ends

    def apart(self, row: Tensor, zero: bool = False) -> list[Tensor]:
        """Of each group, (b, heads, l, d) in at least float32, of a row (1, heads, N, d); what is no token is zero if
        asked for, and some number otherwise."""
        _, heads, length, width = row.shape
        tokens = row.transpose(1, 2).reshape(length, heads * width)
        dtype = torch.float64 if row.dtype == torch.float64 else torch.float32
        parts = []
        for batch, longest, source, padding in self._on(row.device)[0]:
            part = tokens[source] if isinstance(source, slice) else tokens.index_select(0, source)
            if zero and len(padding):
                part.index_fill_(0, padding, 0)
            part = part.view(batch, longest, heads, width).transpose(1, 2)
            # Where the precision stays, `to` leaves the order, too.
            parts.append(part.to(dtype, memory_format=torch.contiguous_format).contiguous())
        return parts

    def joined(self, parts: Sequence[Tensor], length: int, dtype: torch.dtype) -> Tensor:
        """The row (1, heads, N, d) of the groups' (b, heads, l, d), zero in its padding; N is ``length``."""
        _, heads, _, width = parts[0].shape
        rows = [part.transpose(1, 2).to(dtype).reshape(-1, heads * width) for part in parts]
        tokens = rows[0].new_empty(length, heads * width)
        back = self._on(tokens.device)[1]
        torch.index_select(rows[0] if len(rows) == 1 else torch.cat(rows), 0, back, out=tokens[: self.tokens])
        tokens[self.tokens :] = 0
        return tokens.view(1, length, heads, width).transpose(1, 2)

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """What is added to scores (b, l, r · l): −∞ where a key is later than the query."""
        longest, rows = key.shape[1], query.shape[1]
        kind = (longest, rows, query.dtype)
        if kind not in self._masks:
            self._masks[kind] = _causal_mask(query, key)
        return self._masks[kind]


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """Within it, :func:`short_attention` takes a row for sequences that lie so in it."""
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
    """Attention in plain matrix products for short sequences, causal or by a mask, in float32, returned in the query's
    precision; everything else is PyTorch's scaled dot product attention, in float32 too.

    The sequences of edits have some dozen tokens. PyTorch's kernel, made for long ones, takes 1.7 times as long on them
    in float32 (forward and backward, 40 sequences of 12 tokens), and its gradient eight times as long in bfloat16. That
    is on a CPU; on a GPU it is PyTorch's kernels in the query's precision, those of packed sequences too if they can.

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
    return output.to(dtype, memory_format=torch.contiguous_format), None


class _ShortAttention(torch.autograd.Function):
    """softmax(s · q kᵀ + mask) v with its gradient written out; q is (b, r · L, d), r queries a key; k, v (b, K, d).

    Without a mask (B or 1, 1, L, K), of B sequences with b / B key-value heads each, it is causal.

    The scores are held as (b, K, r · L): PyTorch's softmax over the last axis takes ten times as long for a dozen
    numbers as for rows that fill the processor's vectors, but over another axis it fills them with many queries.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None) -> Tensor:
        if seen is None:
            weights = _weights(query, key, scale, _causal_mask(query, key))
        else:
            scores = torch.bmm(key, query.mT).mul_(scale)
            batch, length = len(seen), seen.shape[2]
            # All heads of a sequence, and of all sequences with one mask, as (…, K, r, L).
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
    """The same of sequences in one row: query (1, heads, N, d), key, value (1, key-value heads, N, d), each group of
    them (see :class:`Packing`) by itself."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Packing) -> Tensor:
        groups = key.shape[1]
        outputs, kept = [], []
        for q, k, v in zip(packing.apart(query), packing.apart(key), packing.apart(value), strict=True):
            shape = (len(q) * groups, -1, q.shape[3])
            rows = [x.view(shape) for x in (q, k, v)]
            weights = _weights(rows[0], rows[1], scale, packing.mask(rows[0], rows[1]))
            outputs.append(torch.bmm(weights.mT, rows[2]).view(q.shape))
            kept += [*rows, weights]
        ctx.save_for_backward(*kept)
        ctx.scale, ctx.packing = scale, packing
        return packing.joined(outputs, query.shape[2], query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        packing, parts = ctx.packing, []
        for i, part in enumerate(packing.apart(cotangent, zero=True)):
            query, key, value, weights = ctx.saved_tensors[4 * i : 4 * i + 4]
            found = _gradients(part.view(query.shape), query, key, value, weights, ctx.scale)
            parts.append([g.view(len(part), -1, *part.shape[2:]) for g in found])
        joined = (packing.joined(of_one, cotangent.shape[2], cotangent.dtype) for of_one in zip(*parts, strict=True))
        return *joined, None, None


def _has_packed_kernel(query: Tensor, key: Tensor, packing: Packing) -> bool:
    """Whether PyTorch's flash attention takes a row (1, heads, N, d) of packed sequences."""
    return (
        query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] % 8 == 0 and query.shape[3] <= 256
        and query.shape[1] % key.shape[1] == 0 and query.shape[2] == packing.tokens
        and _packed_kernel_works(query.device, query.dtype)
    )  # fmt: skip


def _by_packed_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Packing) -> Tensor:
    """What :class:`_PackedAttention` gives, by PyTorch's flash attention."""
    ends, longest = packing.ends(query.device), packing.longest
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (N, heads, d)
    output = torch.ops.aten._flash_attention_forward(*rows, ends, ends, longest, longest, 0.0, True, False, scale=scale)
    return output[0].transpose(0, 1)[None]


@cache
def _packed_kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch and GPU have the kernel, and it gives what :class:`_PackedAttention` does."""
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
    """softmax(s · k qᵀ + mask) over the keys, (b, L, r · L)."""
    return torch.baddbmm(mask.expand(len(key), *mask.shape), key, query.mT, alpha=scale).softmax(1)


def _gradients(
    cotangent: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key and value of the output's."""
    for_weights = torch.bmm(value, cotangent.mT)
    for_scores = torch._softmax_backward_data(for_weights, weights, 1, weights.dtype).mul_(scale)
    return torch.bmm(for_scores.mT, key), torch.bmm(for_scores, query), torch.bmm(weights, cotangent)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """PyTorch's mask; none for packed sequences, which are kept apart without."""
    return sdpa_mask(*args, **kwargs) if _packing.get() is None else None


def prefer_fast_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU or a GPU use :func:`short_attention` where it uses PyTorch's."""
    if model.device.type in ("cpu", "cuda") and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, short_attention)
        AttentionMaskInterface.register(NAME, _mask)
        model.set_attn_implementation(NAME)
