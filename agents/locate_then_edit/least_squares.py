"""Updates by least squares, as factors and as dense matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def least_squares_keys(keys: Tensor, system: Tensor) -> Tensor:
    """ũ = K (S + KᵀK)⁻¹ in float64, (N, d_in). With residuals R (N, d_out) as ṽ, ΔW = Rᵀũ solves
    min ‖ΔW Kᵀ − Rᵀ‖² + tr(ΔW S ΔWᵀ).

    Args:
        keys: K, (N, d_in).
        system: S, (d_in, d_in), positive definite.
    """
    keys = keys.double()
    return torch.cholesky_solve(keys.T, torch.linalg.cholesky(system + keys.T @ keys)).T


def dense(keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW = ṽᵀũ (d_out, d_in) by module."""
    return {m: values[m].T @ keys[m] for m in keys}
