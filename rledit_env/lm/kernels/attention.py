"""Attention of short sequences, padded or packed in one row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rledit_env.lm.kernels.packing import NAME, SHORT, Packing, causal_mask, current_packing
from rledit_env.lm.kernels.warning import shown, warn_once

# PyTorch's kernels for a GPU except cuDNN's, which makes a plan for every new length: 1.4 ms a call on a Hopper.
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    These times are for a CPU. On a GPU PyTorch's kernels are used, in the query's precision; packed sequences use its
    flash attention where that can take them.

    Args:
        query: (B, heads, L, d).
        key, value: (B, key-value heads, K, d).
        attention_mask: (B or 1, 1, L, K) bool, whether a query may see a key; None is causal, with K = L.
        dropout, scaling, is_causal, options: as transformers gives them to an attention function.

    Returns:
        (B, L, heads, d), and None in place of the weights.
    """
    dtype, (batch, heads, length, width) = query.dtype, query.shape
    scale = width**-0.5 if scaling is None else scaling
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    is_plain = not dropout and all(options.get(name) is None for name in ("position_bias", "softcap"))
    if (packing := current_packing()) is not None:
        if not (causal and is_plain and key.shape[2] == length and value.shape[3] == width):
            raise ValueError("this attention is not of the kind that keeps packed sequences apart")
        return _attend_packed(packing, module, query, key, value, scale).transpose(1, 2), None
    others: Any = {"attention_mask": attention_mask, "dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    sdpa: Callable[..., tuple[Tensor, None]] = partial(sdpa_attention_forward, module, **others, **options)
    if query.is_cuda:
        with sdpa_kernel(PLANLESS):
            return sdpa(query, key, value)
    if dtype in (torch.bfloat16, torch.float16):  # one copy for precision and memory order
        query, key, value = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (query, key, value))
    masked = (
        attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.dim() == 4
        and attention_mask.shape[1] == 1 and key.shape[2] <= 4 * SHORT
    )  # fmt: skip
    if not ((masked or causal and key.shape[2] == length) and is_plain and length <= SHORT and value.shape[3] == width):
        return sdpa(query, key, value)[0].to(dtype), None
    groups = key.shape[1]  # each serves heads / groups queries, whose rows make one product with it
    output = _ShortAttention.apply(
        query.reshape(batch * groups, heads // groups * length, width),
        *(states.reshape(batch * groups, -1, width) for states in (key, value)),
        scale, attention_mask if masked else None,
    )  # fmt: skip
    return output.view(batch, heads, length, width).transpose(1, 2).to(dtype).contiguous(), None


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
            weights = _attention_weights(query, key, scale, causal_mask(query, key))
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
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        return *_gradients(cotangent, query, key, value, weights, ctx.scale), None, None


class _PackedAttention(torch.autograd.Function):
    """Causal attention of packed sequences: query (1, heads, N, d), key and value (1, key-value heads, N, d). Each
    group (see :class:`Packing`) is computed by itself, as in :class:`_ShortAttention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Packing) -> Tensor:
        groups = key.shape[1]
        outputs, saved = [], []
        parts = packing.apart(query), packing.apart(key, keys=True), packing.apart(value, keys=True)
        for group, (q, k, v) in enumerate(zip(*parts, strict=True)):
            shape = (len(q) * groups, -1, q.shape[3])
            rows = [x.view(shape) for x in (q, k, v)]
            weights = _attention_weights(rows[0], rows[1], scale, packing.mask(group, rows[0], rows[1]))
            outputs.append(torch.bmm(weights.mT, rows[2]).view(q.shape))
            saved += [*rows, weights]
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.packing, ctx.keys = scale, packing, key.shape[2]
        return packing.joined(outputs, query.shape[2], query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        packing, length, dtype = ctx.packing, cotangent.shape[2], cotangent.dtype
        gradients: list[list[Tensor]] = [[], [], []]
        for i, part in enumerate(packing.apart(cotangent, zero=True)):
            query, key, value, weights = ctx.saved_tensors[4 * i : 4 * i + 4]
            group_gradients = _gradients(part.view(query.shape), query, key, value, weights, ctx.scale)
            for parts, gradient, states in zip(gradients, group_gradients, (part, key, value), strict=True):
                parts.append(gradient.view(len(part), -1, *states.shape[-2:]))
        lengths = length, ctx.keys, ctx.keys
        joined = (packing.joined(gradients[i], lengths[i], dtype, keys=i > 0) for i in range(3))
        return *joined, None, None


def _attend_packed(packing: Packing, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of a packed row (1, heads, N, d), in which a past's keys and values take part, too."""
    if packing.written is not None:
        packing.written.write(module.layer_idx, key, value)
    if packing.past is not None:
        key, value = packing.past.followed_by(module.layer_idx, key, value)
    use_kernel = query.is_cuda and _has_packed_kernel(query, key, packing)
    output: Tensor = (_run_packed_kernel if use_kernel else _PackedAttention.apply)(query, key, value, scale, packing)
    return output


def _has_packed_kernel(query: Tensor, key: Tensor, packing: Packing) -> bool:
    """Whether PyTorch's flash attention can take this row (1, heads, N, d) of packed sequences."""
    return (
        query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] % 8 == 0 and query.shape[3] <= 256
        and query.shape[1] % key.shape[1] == 0 and query.shape[2] == packing.tokens and not packing.shares
        and _packed_kernel_works(query.device, query.dtype)
    )  # fmt: skip


def _run_packed_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Packing) -> Tensor:
    """The result of :class:`_PackedAttention`, computed by PyTorch's flash attention."""
    ends, longest = packing.ends(query.device), packing.longest
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (N, heads, d)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        *rows, ends, ends, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return output.transpose(0, 1)[None]


@cache
def _packed_kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch and GPU have the kernel, and it gives the results of :class:`_PackedAttention`."""
    packing = Packing([3, 17, 9])
    numbers = torch.randn(4, 29, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    query, key, value = numbers[None], numbers[None, :2], numbers[None, 2:]
    implementations: list[Callable[..., Tensor]] = [_run_packed_kernel, _PackedAttention.apply]
    try:
        results = []
        for attention in implementations:
            leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
            with torch.enable_grad():
                output = attention(*leaves, 0.3, packing)
                results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    except torch.OutOfMemoryError:  # says nothing about the kernel, and the answer is cached
        raise
    except (AttributeError, TypeError, RuntimeError) as error:  # no such operation, another signature or GPU
        warn_once("attention of packed sequences", shown(error))
        return False
    if all(bool((a - b).norm() <= 0.03 * b.norm()) for a, b in zip(*results, strict=True)):
        return True
    warn_once("attention of packed sequences", "its numbers are others")
    return False


def _attention_weights(query: Tensor, key: Tensor, scale: float, mask: Tensor) -> Tensor:
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
    return sdpa_mask(*args, **kwargs) if current_packing() is None else None


def prefer_fast_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU or a GPU use :func:`short_attention` instead of PyTorch's attention."""
    if model.device.type in ("cpu", "cuda") and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, short_attention)
        AttentionMaskInterface.register(NAME, _mask)
        model.set_attn_implementation(NAME)
