"""Gated feed-forward layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rledit_env.lm.classes import prefer

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _Gate(torch.autograd.Function):
    """silu(gate) ⊙ up. It saves only these two tensors for its gradient, two thirds of the memory that the single
    operations save, and rounds as they do."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        for_up = F.silu(gate).mul_(cotangent)
        return torch.ops.aten.silu_backward(cotangent * up, gate), for_up


class FastGate(nn.Module):
    """Mixin for a model's gated feed-forward layers (see :func:`prefer_fast_gates`)."""

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        output: Tensor = parts.down_proj(_Gate.apply(parts.gate_proj(x), parts.up_proj(x)))
        return output


def prefer_fast_gates(model: PreTrainedModel) -> None:
    """Let a model compute its gated feed-forward layers by :class:`_Gate`.

    Each class of layer is first tried on random numbers from a fixed seed. Where the results differ, it stays as it is.
    """
    prefer(model, _faster)


@torch.no_grad()
def _faster(module: nn.Module) -> type[nn.Module] | None:
    """A faster class for a layer with the same results; None where there is none."""
    cls = type(module)
    if set(module._modules) != set(PARTS) or issubclass(cls, FastGate):
        return None
    faster = type(f"Fast{cls.__name__}", (FastGate, cls), {"__module__": cls.__module__})
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}
    small = {name: nn.utils.skip_init(nn.Linear, *size) for name, size in sizes.items()}  # no random number is drawn
    for part in small.values():
        for parameter in part.parameters():
            parameter.normal_(generator=generator)
    trial = copy.copy(module)
    trial._modules = {**small, "act_fn": module.get_submodule("act_fn")}
    x = torch.randn(3, 4, generator=generator)
    expected = trial(x)
    trial.__class__ = faster
    actual = trial(x)
    return faster if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-5, atol=1e-5) else None
