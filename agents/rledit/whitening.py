"""Running moments that whiten the value gradients (StableEdit), and which moments a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from agents.rledit.config import HypernetworkConfig
from agents.rledit.normaliser import RunningNormaliser


class WhiteningNormaliser(RunningNormaliser):
    """Running moments of rows [u; δ]: keys are standardised, value gradients are whitened (StableEdit, ICML 2026).

    δ̂ = (δ − mean) Σ^(−1/2), where Σ is the sum of (δᵢ − mean)(δᵢ − mean)ᵀ over the n rows so far, divided as in the
    published code by n − d_out − 1. Eigenvalues of Σ below ``floor`` are raised to it. Until n exceeds d_out + 1, δ is
    standardised like u.

    Args:
        d_in, d_out: widths of u and δ.
        device: of the tensors.
        variance, epsilon: of the standardised part, see `RunningNormaliser`.
        floor: the smallest eigenvalue of Σ.
    """

    def __init__(
        self, d_in: int, d_out: int, device: torch.device | str = "cpu",
        variance: Literal["exact", "published"] = "exact", epsilon: float = 1e-8, floor: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(d_in + d_out, device, variance=variance, epsilon=epsilon)
        self.d_in, self.d_out, self.floor = d_in, d_out, floor
        self.products = torch.zeros(d_out, d_out, device=device)
        self._whitening: Tensor | None = None  # Σ^(−1/2) of the present moments, once it is needed

    def update(self, rows: Tensor) -> None:
        if len(rows):
            mean = rows[:, self.d_in :].mean(0)
            centred = rows[:, self.d_in :] - mean
            self._add_products(len(rows), mean, centred.T @ centred)
        super().update(rows)

    def merge(self, other: RunningNormaliser) -> None:
        """Add the rows of other moments.

        Raises:
            TypeError: the other moments have no covariance.
        """
        if not isinstance(other, WhiteningNormaliser):
            raise TypeError(f"the moments are {type(other).__name__}; whitening needs those of a WhiteningNormaliser")
        if float(other.count):
            self._add_products(other.count, other.mean[self.d_in :], other.products)
        super().merge(other)

    def _add_products(self, count: Tensor | int, mean: Tensor, products: Tensor) -> None:
        """Add the products of other rows about their mean; before the rows are added to the other moments."""
        shift = mean - self.mean[self.d_in :]
        weight = self.count * count / (self.count + count)
        self.products = self.products + products + weight * torch.outer(shift, shift)
        self._whitening = None

    @property
    def whitens(self) -> bool:
        """Whether there are enough rows for the covariance; without them, δ is standardised."""
        return float(self.count) > self.d_out + 1

    def covariance(self) -> Tensor:
        """Σ (d_out, d_out), in float64."""
        return self.products.double() / (self.count.double() - self.d_out - 1)

    def whitening(self) -> Tensor:
        """Σ^(−1/2) with the eigenvalues of Σ raised to the floor, (d_out, d_out)."""
        if self._whitening is None:
            values, vectors = torch.linalg.eigh(self.covariance())
            inverse_root = (vectors * values.clamp(min=self.floor).rsqrt()) @ vectors.T
            self._whitening = inverse_root.to(self.products.dtype)
        return self._whitening

    def normalised(self, rows: Tensor) -> Tensor:
        """Rows (N, d_in + d_out) with u standardised and δ whitened."""
        standardised = super().normalised(rows)
        if not self.whitens:
            return standardised
        gradients = (rows[:, self.d_in :] - self.mean[self.d_in :]) @ self.whitening()
        return torch.cat([standardised[:, : self.d_in], gradients], 1)

    def begin(self, start: RunningNormaliser, start_rows: float) -> None:
        """Begin a stream with all rows of ``start``, as if they were the stream's first."""
        self.load({name: tensor.clone() for name, tensor in start.state().items()})

    def empty(self, device: torch.device) -> WhiteningNormaliser:
        return WhiteningNormaliser(self.d_in, self.d_out, device)

    def state(self) -> dict[str, Tensor]:
        """The count, the mean, the sum of squares and the sums of products, by name."""
        return super().state() | {"products": self.products}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.products = state["products"].to(self.mean.device)
        self._whitening = None


def empty_normaliser(
    config: HypernetworkConfig, shape: tuple[int, int], device: torch.device
) -> RunningNormaliser:
    """Moments of no rows [u; δ] of a module of this shape (d_in, d_out), of the kind that the configuration says."""
    variance, epsilon = config.normaliser_variance, config.normaliser_epsilon
    if config.normaliser == "whitened":
        return WhiteningNormaliser(*shape, device, variance, epsilon, config.eigenvalue_floor)
    return RunningNormaliser(sum(shape), device, variance=variance, epsilon=epsilon)


def normaliser_size(config: HypernetworkConfig, shape: tuple[int, int]) -> int:
    """The number of values in the moments of a module of this shape."""
    products = shape[1] ** 2 if config.normaliser == "whitened" else 0
    return 2 * sum(shape) + 1 + products
