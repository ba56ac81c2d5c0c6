"""The residual blocks of a hypernetwork."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rledit_env.lm.kernels.products import linear, outer


class ResidualBlocks(nn.Module):
    """Residual blocks z ← z + scale_l ⊙ ReLU(z A B + b) + shift_l; modules of one shape share A, B and b.

    With ``inside``, scale and shift are inside the ReLU, as in MEND: z ← z + ReLU(scale_l ⊙ (z A B + b) + shift_l).

    A starts as N(0, 1/width), or with ``unit`` as N(0, 1). B and b start at zero, so the untrained network is the
    identity. The ReLU is written as a clamp, whose gradient at zero is 1; torch.relu's gradient is 0 there, and B and b
    would never learn.
    """

    def __init__(
        self, width: int, rank: int, blocks: int, modules: int, precision: Literal["float32", "bfloat16"] = "float32",
        inside: bool = False, unit: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_half, self.inside = precision == "bfloat16", inside
        divisor = 1.0 if unit else math.sqrt(width)
        self.down = nn.ParameterList([nn.Parameter(torch.randn(width, rank) / divisor) for _ in range(blocks)])
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(rank, width)) for _ in range(blocks)])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(blocks)])
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(modules, width)) for _ in range(blocks)])
        self.shift = nn.ParameterList([nn.Parameter(torch.zeros(modules, width)) for _ in range(blocks)])

    def forward(self, z: Tensor, members: Sequence[int]) -> Tensor:
        """Transform the rows of several modules of one shape with one matrix product a block.

        Args:
            z: the modules' rows, (M, N, width).
            members: the places of these M modules among the shape's modules.

        Returns:
            The transformed rows, (M, N, width).
        """
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            scale, shift = self.scale[i][members], self.shift[i][members]
            if self.inside:
                kind = torch.bfloat16 if self.in_half else z.dtype
                inner = linear(linear(z.to(kind), down.to(kind).T), up.to(kind).T).to(z.dtype) + self.bias[i]
                z = z + (scale[:, None] * inner + shift[:, None]).clamp(min=0)
                continue
            factors = (down.detach().bfloat16(), up.detach().bfloat16()) if self.in_half else (down, up)
            z = ResidualBlock.apply(z, down, up, self.bias[i], scale, shift, *factors)
        return z


class ResidualBlock(torch.autograd.Function):
    """z + scale ⊙ clamp(z A B + b) + shift with its gradient written out, which halves the memory and the memory
    traffic of the single operations.

    z is (M, N, width), scale and shift are (M, width), one row a module. ``run_down`` and ``run_up`` are A and B, or
    their copies in bfloat16; the products are computed in their precision.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  autograd sees tensors only where each is an argument of its own
        ctx: Any, z: Tensor, down: Tensor, up: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, run_down: Tensor,
        run_up: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = z.flatten(0, 1).to(run_down.dtype)  # (M · N, width)
        narrow = linear(rows, run_down.T)  # (M · N, rank)
        inner = linear(narrow, run_up.T).to(z.dtype).add_(bias).view(z.shape)
        passes = inner >= 0
        inner.clamp_(min=0)
        ctx.save_for_backward(rows, run_down, run_up, scale, narrow, inner, passes)
        return torch.addcmul(z, scale[:, None], inner).add_(shift[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        rows, run_down, run_up, scale, narrow, inner, passes = ctx.saved_tensors
        for_scale = torch.stack([(c * i).sum(0) for c, i in zip(cotangent, inner, strict=True)])
        for_inner = (cotangent * scale[:, None]).mul_(passes).flatten(0, 1)
        for_bias = for_inner.sum(0)
        for_inner = for_inner.to(rows.dtype)
        for_narrow = linear(for_inner, run_up)
        for_z = linear(for_narrow, run_down).to(cotangent.dtype).view(cotangent.shape).add_(cotangent)
        for_down, for_up = (outer(a, b).to(cotangent.dtype) for a, b in ((rows, for_narrow), (narrow, for_inner)))
        return for_z, for_down, for_up, for_bias, for_scale, cotangent.sum(1), None, None
