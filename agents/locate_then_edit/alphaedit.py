"""AlphaEdit (Fang et al., "Null-Space Constrained Knowledge Editing for Language Models", ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from agents.base import Callback
from agents.locate_then_edit.least_squares import least_squares_keys
from agents.locate_then_edit.locate import LocateConfig
from agents.locate_then_edit.memit import MEMITAgent
from agents.locate_then_edit.value_optimisation import ValueConfig
from rledit_env.interface import Environment

Self = TypeVar("Self", bound="AlphaEditAgent")


@dataclass(frozen=True)
class AlphaEditConfig(LocateConfig):
    """AlphaEdit's settings; the defaults are those published for Llama-3-8B.

    Attributes:
        threshold: eigenvalues of C below it count as zero; their eigenvectors span the null space
            (``nullspace_threshold``).
        ridge: weight of ‖ΔW‖² in the system (``L2``).
        remember: whether the system contains earlier batches' keys.
    """

    value: ValueConfig = field(
        default_factory=lambda: ValueConfig(steps=25, learning_rate=0.1, clamp=0.75, relative_to="state")
    )
    threshold: float = 2e-2
    ridge: float = 10.0
    remember: bool = True


class AlphaEditAgent(MEMITAgent):
    """AlphaEdit writes MEMIT's shares R by ΔW = R K₁ᵀP (K_pK_pᵀP + K₁K₁ᵀP + ridge·I)⁻¹ (Eq. 14), with P the projection
    on the null space of the preserved keys' second moment C, and K_p the keys of earlier batches.

    With an orthonormal basis U of the null space, P = UUᵀ, this is least squares in the coordinates Uᵀk:
    ΔW = R (K₁ᵀU) (Uᵀ(K_pK_pᵀ + K₁K₁ᵀ)U + ridge·I)⁻¹ Uᵀ, a symmetric system of the null space's size. It equals the
    recursion of `MEMITAgent` in these coordinates, with ``ridge`` as its anchor to W₀, so AlphaEdit has no setting
    ``recursion``.

    As published: the values, the keys (half plain prompt, half contexts), the null space by a threshold on C's
    eigenvalues, the earlier batches' keys and the ridge. Ours: float64 where the published code solves in float32.

    Args:
        env, config, seed: see `LocateAgent`.
    """

    name = "alphaedit"
    config_class = AlphaEditConfig
    config: AlphaEditConfig

    def __init__(self, env: Environment, config: AlphaEditConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        self._bases: dict[str, Tensor] = {}

    def learn(
        self: Self, total_timesteps: int = 0, callback: Callback | None = None, progress_bar: bool = True,
        reset_num_timesteps: bool = True,
    ) -> Self:  # fmt: skip
        """Compute contexts, key statistics, NAS's norm and the null spaces."""
        super().learn(total_timesteps, callback, progress_bar)
        for module in self.modules:
            self.basis(module)
        return self

    def basis(self, module: str) -> Tensor:
        """The basis U of a module's null space, (d_in, m) float64.

        Raises:
            ValueError: the null space is empty.
        """
        if module not in self._bases:
            self._bases[module] = null_space(self.second_moment(module), self.config.threshold)
        return self._bases[module]

    def update_keys(self, module: str, keys: Tensor) -> Tensor:
        basis = self.basis(module)
        projected = keys @ basis  # (N, m)
        system = self.config.ridge * torch.eye(basis.shape[1], dtype=keys.dtype, device=keys.device)
        if self.config.remember:
            system += self.key_moments.get(module, 0)
            self.key_moments[module] = self.key_moments.get(module, 0) + projected.T @ projected
        return least_squares_keys(projected, system) @ basis.T


def null_space(second_moment: Tensor, threshold: float) -> Tensor:
    """Orthonormal eigenvectors (d_in, m) of C with eigenvalues below the threshold.

    Raises:
        ValueError: no eigenvalue is below the threshold.
    """
    decomposed: tuple[Tensor, Tensor] = torch.linalg.eigh(second_moment)
    eigenvalues, vectors = decomposed
    below = eigenvalues < threshold
    if not below.any():
        raise ValueError(
            f"threshold is {threshold:g}, but the least eigenvalue of the keys' second moment is "
            f"{float(eigenvalues[0]):.2g}: the null space is empty; give a larger threshold"
        )
    return vectors[:, below]
