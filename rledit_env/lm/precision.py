"""Converts numbers to float32 or more, and compares them up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def same_numbers(one: Tensor, other: Tensor, precision: torch.dtype) -> bool:
    """Whether numbers of some tokens (P, …) are the same up to a precision's rounding, measured token by token.

    In bfloat16, rounding may send a token to another expert, so the median error decides there.
    """
    is_finite = torch.isfinite(other)
    one, other = (torch.where(is_finite, numbers.double(), 0.0) for numbers in (one, other))
    errors = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)
    if precision.itemsize < 4:
        return bool(errors.median() <= 0.1)
    return bool((errors <= 1e-3).all())
