"""Switches all kernels on for a model, and off again."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from rledit_env.lm.kernels.attention import prefer_fast_attention
from rledit_env.lm.kernels.gates import prefer_fast_gates
from rledit_env.lm.kernels.norms import prefer_fast_norms
from rledit_env.lm.kernels.products import prefer_fast_products


def prefer_fast_modules(model: PreTrainedModel) -> Callable[[], None]:
    """Let a model use all kernels that suit it; returns a function that puts its own modules back."""
    classes = [(module, type(module)) for module in model.modules()]
    attention = model.config._attn_implementation
    prefer_fast_attention(model)
    prefer_fast_norms(model)
    prefer_fast_gates(model)
    prefer_fast_products(model)

    def put_back() -> None:
        for module, cls in classes:
            module.__class__ = cls
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)

    return put_back
