"""How a batch's rows become one update: MEND's sum of rank-1 updates, or least squares (MALMEN, RLEdit).

"recursive" takes its values from least squares as well, and its keys ũ from `agents.rledit.key_memory`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def mend(key_part: Tensor, gradient_part: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """ũ = û and ṽ = −η δ̂ of M modules, given û (M, N, d_in), δ̂ (M, N, d_out) and η (M,)."""
    return key_part, -step_sizes[:, None, None] * gradient_part


def least_squares_values(
    keys: Tensor, key_part: Tensor, gradient_part: Tensor, step_sizes: Tensor, coefficient: Literal["key", "normalised"]
) -> Tensor:
    """vᵢ = −η (uᵢ·ûᵢ) δ̂ᵢ, or −η ‖ûᵢ‖² δ̂ᵢ, (M, N, d_out), with u (M, N, d_in) and the arguments of :func:`mend`."""
    left = keys if coefficient == "key" else key_part
    return -step_sizes[:, None, None] * (left * key_part).sum(2, keepdim=True) * gradient_part


def least_squares_keys(keys: Tensor, log_damping: Tensor) -> Tensor:
    """ũ = (u uᵀ + λI)⁻¹ u (M, N, d_in), with which ΔW = vᵀũ minimises ‖ΔW uᵀ − vᵀ‖² + λ‖ΔW‖²; log λ is (M,)."""
    damping = log_damping.exp()[:, None, None]
    gram = keys @ keys.mT + damping * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)  # (M, N, N)
    return torch.cholesky_solve(keys, torch.linalg.cholesky(gram))


def inverse_curvature(curvature: Tensor, damping: float) -> Tensor:
    """(G + γ·mean(diag G)·I)⁻¹ in float64, with G (d_out, d_out) and γ the damping."""
    ridge = damping * float(curvature.diagonal().mean()) or 1.0
    identity = torch.eye(len(curvature), device=curvature.device, dtype=torch.float64)
    system = (curvature + curvature.T) / 2 + ridge * identity
    return torch.cholesky_inverse(torch.linalg.cholesky(system))


def turned(values: Tensor, turns: Tensor) -> Tensor:
    """Each vᵢ (M, N, d_out) multiplied by its module's matrix (M, d_out, d_out) and rescaled to its earlier norm."""
    rows = values @ turns
    length: Tensor = rows.norm(dim=2, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    scale: Tensor = values.norm(dim=2, keepdim=True) / length
    return rows * scale
