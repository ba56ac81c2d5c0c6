"""Credit assignment: the gradient of a trajectory's return with respect to each step's action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rledit_env.lm.kernels.products import linear


@dataclass(frozen=True)
class _Step:
    """A step's factors, and the gradient of the return with respect to them so far."""

    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    for_keys: dict[str, Tensor]
    for_values: dict[str, Tensor]
    remaining: dict[str, Tensor]  # module → share of the step's update that is still in the weights; absent: all of it


class CreditAccumulator:
    """Computes ∂R/∂ũ_t and ∂R/∂ṽ_t of all steps, one reward at a time.

    With G_τ = γ^τ ∂r_τ/∂W_τ, step t's ṽ_t is credited with Σ_{τ≥t} G_τ ũ_tᵀ. That sum is the sum over all τ minus the
    sum over τ < t, and the latter is known at step t. One running sum of dense gradients therefore serves all steps,
    and neither the time nor the dense memory of a step grows with the trajectory.

    In DAFNet a step also shrinks the earlier updates: ΔW_τ = ṽ_τᵀũ_τ − (1 − p_τ)(W_{τ−1} − W₀) with p_τ a constant, and
    W_τ = W₀ + p_τ (W_{τ−1} − W₀) + ṽ_τᵀũ_τ. Then ṽ_t is credited with Σ_{τ≥t} (Π_{t<j≤τ} p_j) G_τ ũ_tᵀ. G_τ is
    projected immediately on the factors of all earlier steps, so the time of a step grows with the trajectory.

    Args:
        credit: "trajectory" (the step's own reward and all later ones) or "step" (its own only).
        key_gradients: whether ∂R/∂ũ is needed; the ũ of "recursive" does not depend on the parameters.
        shrinking: whether steps shrink earlier updates.
    """

    def __init__(self, credit: str, key_gradients: bool, shrinking: bool = False) -> None:
        self.credit, self.key_gradients, self.shrinking = credit, key_gradients, shrinking
        self._steps: list[_Step] = []
        self._sum: dict[str, Tensor] = {}  # Σ_τ G_τ of the steps so far, (d_out, d_in) by module

    def take(
        self,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        reward_gradient: Mapping[str, Tensor] | None,
        action_gradient: Mapping[str, Mapping[str, Tensor]],
        discount: float,
        retained: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add step τ.

        Args:
            keys: module → ũ_τ (N, d_in).
            values: module → ṽ_τ (N, d_out).
            reward_gradient: module → ∂r_τ/∂W_τ (d_out, d_in), None if it is zero. The accumulator keeps these tensors
                and writes to them.
            action_gradient: the direct ∂r_τ/∂a_τ: of the factors as "keys" and "values", or of ΔW_τ as "updates".
            discount: γ^τ.
            retained: module → p_τ, None if the step does not shrink earlier updates.
        """
        changed = action_gradient.get("updates", {})
        if "values" in action_gradient:
            for_values = {m: discount * g for m, g in action_gradient["values"].items()}
            for_keys = {m: discount * g for m, g in action_gradient["keys"].items()} if self.key_gradients else {}
        else:
            for_values = {m: torch.zeros_like(v) for m, v in values.items()}
            for_keys = {m: torch.zeros_like(k) for m, k in keys.items()} if self.key_gradients else {}
        step = _Step(keys, values, for_keys, for_values, {})
        self._credit(step, changed, discount)
        if self.credit == "trajectory" and self.shrinking:
            for earlier in self._steps:
                self._shrink(earlier, reward_gradient or {}, changed, discount, retained or {})
            self._credit(step, reward_gradient or {}, discount)
        elif self.credit == "trajectory":
            self._credit(step, self._sum, -1.0)
            for m, gradient in (reward_gradient or {}).items():
                if m in self._sum:
                    self._sum[m].add_(gradient, alpha=discount)
                else:
                    self._sum[m] = gradient if discount == 1 else gradient.mul_(discount)
        else:
            self._credit(step, reward_gradient or {}, discount)
        self._steps.append(step)

    def _credit(self, step: _Step, gradients: Mapping[str, Tensor], factor: float) -> None:
        """Add the credit of a step's factors for ``factor`` times these gradients (d_out, d_in) of its ΔW."""
        for m, gradient in gradients.items():
            step.for_values[m].add_(linear(step.keys[m], gradient), alpha=factor)
            if self.key_gradients:
                step.for_keys[m].add_(linear(step.values[m], gradient.T), alpha=factor)

    def _shrink(
        self, earlier: _Step, gradients: Mapping[str, Tensor], changed: Mapping[str, Tensor], discount: float,
        retained: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Credit an earlier step for a later step's reward.

        The later step leaves the share p of the earlier update. With s the share that was left before, the credit is
        s p G for the reward and s (p − 1) g for the direct cost of ΔW.
        """
        for m, value in earlier.values.items():
            before = earlier.remaining.get(m, value.new_ones(()))
            left = retained.get(m, value.new_ones(()))
            earlier.remaining[m] = before * left
            if m in gradients:
                self._credit(earlier, {m: earlier.remaining[m] * gradients[m]}, discount)
            if m in changed:
                self._credit(earlier, {m: before * (left - 1) * changed[m]}, discount)

    def finish(self) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Return (∂R/∂ũ_t, ∂R/∂ṽ_t) by module for every step t, and empty the accumulator.

        ∂R/∂ũ_t is empty if it is not needed.
        """
        for step in self._steps:
            self._credit(step, self._sum, 1.0)
        steps, self._steps, self._sum = self._steps, [], {}
        return [(step.for_keys, step.for_values) for step in steps]
