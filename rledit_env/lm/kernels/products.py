"""Matrix products on a CPU.

PyTorch multiplies float32 matrices by Intel's MKL, which uses half of the vector units of other makers' processors.
oneDNN, which comes with PyTorch and does its bfloat16 products, uses all of them: 490 instead of 215 GFLOP/s on two
cores of an AMD EPYC, to the same rounding. On Intel's own processors MKL is as fast for a product and faster for its
gradients, so float32 stays with it there.

oneDNN generates code for every new size, which takes time and up to 1 MB of memory. So matrices, whose number of rows
changes from one product to the next, are padded with zero rows to a few fixed numbers.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rledit_env.lm.classes import prefer
from rledit_env.lm.kernels.warning import shown, warn_once

WORTHWHILE = 2**20  # float32 multiplications above which oneDNN saves more than its overhead of 10 µs


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, differentiable once: (…, k), (n, k), (n,) → (…, n). The weight may be a transposed view."""
    if not compiled(weight, x.numel() * len(weight)) or x.dtype != weight.dtype or not x.numel():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        output: Tensor = _Linear.apply(x, weight, bias)
        return output
    return _multiply_padded(x, weight, bias)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, the sum of the rows' outer products: (m, k), (m, n) → (k, n); no gradient."""
    if not compiled(a, a.numel() * b.shape[1]) or a.dtype != b.dtype or not a.numel():
        return a.t() @ b
    padding = even(len(a)) - len(a)
    a, b = (F.pad(rows, (0, 0, 0, padding)) if padding else rows for rows in (a, b))
    return _multiplied(a.t(), b.t(), None)


def compiled(operand: Tensor, multiplications: int) -> bool:
    """Whether products of this size with operands like this one go to oneDNN, which generates code for them."""
    if operand.device.type != "cpu":
        return False
    if operand.dtype == torch.float32:
        return multiplications >= WORTHWHILE and not mkl_suits() and _available()
    return operand.dtype in (torch.bfloat16, torch.float16)


@cache
def mkl_suits() -> bool:
    """Whether MKL, if PyTorch has it, uses all of this processor: whether the processor is Intel's."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        maker = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        maker = platform.processor()
    return "GenuineIntel" in maker


def even(rows: int) -> int:
    """The number of rows, rounded up to one of the few for which products are computed."""
    if rows <= 16:
        return 1 << max(rows - 1, 0).bit_length()
    quantum = 16 if rows <= 512 else 64
    return -(-rows // quantum) * quantum


class FastLinear(nn.Linear):
    """An `nn.Linear` that multiplies by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FastConv1D(Conv1D):
    """GPT-2's `Conv1D`, whose weight is (d_in, d_out), that multiplies by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias)


FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, Conv1D: FastConv1D}


def prefer_fast_products(model: PreTrainedModel) -> None:
    """Let a float32 model on a CPU multiply by :func:`linear`."""
    if model.dtype == torch.float32 and model.device.type == "cpu":
        prefer(model, lambda module: FASTER.get(type(module)))


class _Linear(torch.autograd.Function):
    """:func:`linear` whose gradients are computed by the same kind of products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _multiply_padded(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = cotangent.flatten(0, -2)
        return (
            linear(cotangent, weight.t()) if for_x else None,
            outer(rows, x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _multiply_padded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    padding = even(len(rows)) - len(rows)
    output = _multiplied(F.pad(rows, (0, 0, 0, padding)) if padding else rows, weight, bias)
    return output[: len(rows)].view(*x.shape[:-1], -1)


def _multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if rows.dtype != torch.float32:
        return F.linear(rows, weight, bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output


@cache
def _available() -> bool:
    """Whether this PyTorch has the operation, and its results are those of `torch.nn.functional.linear`."""
    if not torch.backends.mkldnn.is_available():
        return False
    numbers = torch.randn(3, 48, 40, generator=torch.Generator().manual_seed(0))
    x, weight, bias = numbers[0], numbers[1][:24].t(), numbers[2, 0]
    try:
        actual = _multiplied(x[:, :24], weight, bias)
    except (AttributeError, RuntimeError, TypeError) as error:
        warn_once("matrix product", shown(error))
        return False
    if torch.allclose(actual, F.linear(x[:, :24], weight, bias), rtol=1e-5, atol=1e-5):
        return True
    warn_once("matrix product", "its numbers are others")
    return False
