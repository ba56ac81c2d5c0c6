"""Root mean square norms."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rledit_env.lm.classes import prefer
from rledit_env.lm.precision import at_least_float32


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · scale whose gradient is written out. It takes half the time of autograd's single operations and
    little memory beside x.

    ``scale`` (width,) is in float32 for norms that round the product once (Gemma), in x's precision for those that
    round x / rms(x) first (Llama).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
        rows = at_least_float32(x)
        reciprocal: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
        reciprocal.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, reciprocal)
        return (rows * reciprocal).to(scale.dtype).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, reciprocal = ctx.saved_tensors
        rows, scaled = at_least_float32(x), at_least_float32(cotangent * scale)
        along = torch.linalg.vecdot(scaled, rows).unsqueeze(-1).mul_(reciprocal.square()).div_(-x.shape[-1])
        return torch.addcmul(scaled, rows, along).mul_(reciprocal).to(x.dtype), None, None


class FastNorm(nn.Module):
    """Mixin for a model's root mean square norms (see :func:`prefer_fast_norms`)."""

    weight: Tensor
    one_more = False  # whether the scale is 1 + weight (Gemma), in float32

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        weight = getattr(self, "weight", None)  # some norms of a class have none
        if args or kwargs or weight is None or weight.requires_grad:
            unchanged: Tensor = super().forward(hidden_states, *args, **kwargs)
            return unchanged
        scale = 1.0 + at_least_float32(weight) if self.one_more else weight
        return _normalised(hidden_states, scale, _epsilon(self))


def _normalised(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) · scale as :class:`_RMSNorm` computes it; on a GPU by PyTorch's kernel, which rounds once."""
    if x.is_cuda:
        return F.rms_norm(x.to(scale.dtype), scale.shape, scale, epsilon).to(x.dtype)
    normalised: Tensor = _RMSNorm.apply(x, scale, epsilon)
    return normalised


def prefer_fast_norms(model: PreTrainedModel) -> None:
    """Let a model compute its root mean square norms by :func:`_normalised`.

    Each class of norm is first tried on random numbers from a fixed seed. Where the results differ, it stays as it is.
    """
    prefer(model, _faster)


def _epsilon(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


@torch.no_grad()
def _faster(module: nn.Module) -> type[nn.Module] | None:
    """A faster class for a norm with the same results; None where there is none."""
    cls, weight = type(module), getattr(module, "weight", None)
    if not cls.__name__.endswith("RMSNorm") or issubclass(cls, FastNorm):
        return None
    if weight is None or weight.dim() != 1 or not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return None
    trial: Any = copy.deepcopy(module)
    numbers = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    x, trial.weight.data = numbers[:3], numbers[3]
    expected = trial(x)
    for one_more in (False, True):
        scale = 1.0 + at_least_float32(trial.weight) if one_more else trial.weight
        actual = _normalised(x, scale, _epsilon(module))
        tolerance = 0.01 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
        if actual.dtype == expected.dtype and torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
            return type(f"Fast{cls.__name__}", (FastNorm, cls), {"one_more": one_more, "__module__": cls.__module__})
    return None
