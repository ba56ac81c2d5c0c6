"""Attention of models that run in reduced precision on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_float32"


def sdpa_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, None]:
    """PyTorch's scaled dot product attention, computed in float32 and returned in the query's precision.

    The gradient of PyTorch's kernel takes eight times as long in bfloat16 as in float32 on a CPU (measured with
    sequences of 12 tokens), a seventh of a whole training step.
    """
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *arguments, **options)
    return output.to(query.dtype), None


def prefer_fast_attention(model: PreTrainedModel) -> None:
    """Let a model in half precision on a CPU compute its attention in float32, where it uses PyTorch's."""
    reduced = model.dtype in (torch.bfloat16, torch.float16)
    if reduced and model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, sdpa_in_float32)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
