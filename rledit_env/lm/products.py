"""Matrix products in float32 on a CPU.

PyTorch multiplies float32 matrices by Intel's MKL, which uses half of the vector units of other makers' processors.
oneDNN, which PyTorch brings along and multiplies bfloat16 with, uses all of them: 490 instead of 215 GFLOP/s on two
cores of an AMD EPYC, to the same rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

WORTHWHILE = 2**20  # multiplications from which on oneDNN's overhead (10 µs) is made up for


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, differentiable once: (…, k), (n, k), (n,) → (…, n)."""
    if not _served(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices (m, k) and (k, n), either of which may be a transposed view, differentiable once."""
    return linear(a, b.t())


class FastLinear(nn.Linear):
    """An `nn.Linear` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FastConv1D(Conv1D):
    """GPT-2's `Conv1D`, whose weight is (d_in, d_out), by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias)


FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, Conv1D: FastConv1D}


def prefer_fast_products(model: PreTrainedModel) -> None:
    """Let a float32 model on a CPU multiply by :func:`linear`."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return
    for module in model.modules():
        if type(module) in FASTER and not hasattr(module, "_hf_hook"):  # a hook: the weight may rest elsewhere
            module.__class__ = FASTER[type(module)]


class _Linear(torch.autograd.Function):
    """:func:`linear` with its gradients by the same products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = cotangent.flatten(0, -2)
        return (
            linear(cotangent, weight.t()) if for_x else None,
            product(rows.t(), x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply these."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * len(weight) >= WORTHWHILE
        and _available()
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x if x.dim() == 2 else x.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@cache
def _available() -> bool:
    """Whether this PyTorch has the operation, and it computes what `torch.nn.functional.linear` does."""
    if not torch.backends.mkldnn.is_available():
        return False
    numbers = torch.randn(3, 48, 40, generator=torch.Generator().manual_seed(0))
    x, weight, bias = numbers[0], numbers[1][:24].t(), numbers[2, 0]
    try:
        got = _onednn(x[:, :24], weight, bias)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(got, F.linear(x[:, :24], weight, bias), rtol=1e-5, atol=1e-5)
