"""Which reward is whose doing: the gradient of a trajectory's return with respect to each step's action."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class CreditAccumulator:
    """∂R/∂ũ_t and ∂R/∂ṽ_t of all steps so far, as rewards come in.

    Every reward gradient G_τ is projected at once on the factors of the steps it depends on (one product with the
    stacked factors a module), so that no dense gradient outlives its step.

    Args:
        credit: "trajectory" (all steps t ≤ τ) or "step" (t = τ only).
        key_gradients: whether ∂R/∂ũ is needed; the recursion's ũ does not depend on the parameters.
    """

    def __init__(self, credit: str, key_gradients: bool) -> None:
        self.credit, self.key_gradients = credit, key_gradients
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.for_keys: dict[str, Tensor] = {}
        self.for_values: dict[str, Tensor] = {}
        self.rows: list[int] = []

    def add(
        self,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        reward_gradient: Mapping[str, Tensor] | None,
        action_gradient: Mapping[str, Mapping[str, Tensor]],
        discount: float,
    ) -> None:
        """Take in step τ: its factors, ∂r_τ/∂W_τ (None if it is zero), the direct ∂r_τ/∂a_τ, and γ^τ."""
        start = sum(self.rows) if self.credit == "step" else 0
        self.rows.append(len(next(iter(keys.values()))))
        for m in keys:
            gradient = reward_gradient[m] if reward_gradient is not None else None
            self.keys[m] = _stacked(self.keys.get(m), keys[m])
            self.for_values[m] = _stacked(self.for_values.get(m), discount * action_gradient["values"][m])
            if gradient is not None:
                self.for_values[m][start:].addmm_(self.keys[m][start:], gradient.T, alpha=discount)
            if self.key_gradients:
                self.values[m] = _stacked(self.values.get(m), values[m])
                self.for_keys[m] = _stacked(self.for_keys.get(m), discount * action_gradient["keys"][m])
                if gradient is not None:
                    self.for_keys[m][start:].addmm_(self.values[m][start:], gradient, alpha=discount)

    def of_step(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(∂R/∂ũ_t, ∂R/∂ṽ_t) by module; the first is empty if it is not needed."""
        part = slice(sum(self.rows[:step]), sum(self.rows[: step + 1]))
        return {m: g[part] for m, g in self.for_keys.items()}, {m: g[part] for m, g in self.for_values.items()}


def _stacked(stack: Tensor | None, rows: Tensor) -> Tensor:
    return rows.clone() if stack is None else torch.cat([stack, rows])
