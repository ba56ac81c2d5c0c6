"""Attention of models that run on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_float32"
SHORT = 64  # tokens; the scores (L, L) of every head are held as they are


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
    """Causal attention in plain matrix products for short sequences without padding, in float32, returned in the
    query's precision; everything else is PyTorch's scaled dot product attention, in float32 too.

    The sequences of edits have some dozen tokens. PyTorch's kernel, made for long ones, takes 1.7 times as long on them
    in float32 (forward and backward, 40 sequences of 12 tokens), and its gradient eight times as long in bfloat16.

    Args:
        query: (B, heads, L, d).
        key, value: (B, key-value heads, L, d).
        others: as transformers gives them to an attention function.

    Returns:
        (B, L, heads, d), and None in place of the weights.
    """
    dtype, (batch, heads, length, width) = query.dtype, query.shape
    if dtype in (torch.bfloat16, torch.float16):  # one copy: in order, too
        query, key, value = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (query, key, value))
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plain = not dropout and all(options.get(name) is None for name in ("position_bias", "softcap"))
    if not (causal and plain and length <= SHORT and key.shape[2] == length and value.shape[3] == width):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return output.to(dtype), None
    groups = key.shape[1]  # each serves heads / groups queries, whose rows make one product with it
    output = _CausalAttention.apply(
        query.reshape(batch * groups, heads // groups * length, width),
        key.reshape(batch * groups, length, width),
        value.reshape(batch * groups, length, width),
        width**-0.5 if scaling is None else scaling,
    )
    output = output.view(batch, heads, length, width).transpose(1, 2)
    return output.to(dtype, memory_format=torch.contiguous_format), None


class _CausalAttention(torch.autograd.Function):
    """softmax(s · q kᵀ + mask) v with its gradient written out; q is (b, r · L, d), r queries a key; k, v (b, L, d).

    PyTorch's softmax takes ten times as long over rows of a dozen numbers as over rows that fill the processor's
    vectors, hence single operations here.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length = key.shape[1]
        future = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
        mask = future.repeat(query.shape[1] // length, 1).expand(len(query), query.shape[1], length)
        weights = torch.baddbmm(mask, query, key.mT, alpha=scale)  # (b, r · L, L)
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.bmm(weights, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        query, key, value, weights = ctx.saved_tensors
        for_value = torch.bmm(weights.mT, cotangent)
        for_scores = torch.bmm(cotangent, value.mT).mul_(weights)
        for_scores.addcmul_(weights, for_scores.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)
        return torch.bmm(for_scores, key), torch.bmm(for_scores.mT, query), for_value, None


def prefer_fast_attention(model: PreTrainedModel) -> None:
    """Let a model on a CPU use :func:`short_attention` where it uses PyTorch's."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, short_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
