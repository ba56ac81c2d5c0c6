"""Which reward is whose doing: the gradient of a trajectory's return with respect to each step's action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rledit_env.lm.kernels.products import linear


@dataclass(frozen=True)
class _Step:
    """A step's factors, and the gradient of the return with respect to them that is known when it has been taken."""

    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    for_keys: dict[str, Tensor]
    for_values: dict[str, Tensor]
    remaining: dict[str, Tensor]  # which share of its update is in the weights, by module; where absent, all of it


class CreditAccumulator:
    """∂R/∂ũ_t and ∂R/∂ṽ_t of all steps, from the rewards as they come in.

    With G_τ = γ^τ ∂r_τ/∂W_τ, step t's ṽ_t is credited with Σ_{τ≥t} G_τ ũ_tᵀ. That sum is the one over all τ less the
    one over τ < t, and the latter is known when step t is taken: so one running sum of dense gradients serves all
    steps, and neither the time nor the dense memory of a step grows with the trajectory.

    Where a step also shrinks what earlier steps added, ΔW_τ = ṽ_τᵀũ_τ − (1 − p_τ)(W_{τ−1} − W₀) with p_τ a constant, so
    that W_τ = W₀ + p_τ (W_{τ−1} − W₀) + ṽ_τᵀũ_τ (DAFNet), ṽ_t is credited with Σ_{τ≥t} (Π_{t<j≤τ} p_j) G_τ ũ_tᵀ. G_τ is
    then projected at once on the factors of all earlier steps: the time of a step grows with the trajectory.

    Args:
        credit: "trajectory" (all rewards from the step's own on) or "step" (its own only).
        key_gradients: whether ∂R/∂ũ is needed; the recursion's ũ does not depend on the parameters.
        shrinking: whether steps shrink what earlier ones added.
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
        """Take in step τ: its factors, ∂r_τ/∂W_τ (None if it is zero), the direct ∂r_τ/∂a_τ of the factors, or of the
        change ΔW_τ under "updates", γ^τ, and p_τ by module where it shrinks (None: 1).

        ``reward_gradient`` is the accumulator's from then on, which keeps its tensors and writes to them.
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
        """Add to a step's credit what ``factor`` times these gradients (d_out, d_in) of ΔW mean for its factors."""
        for m, gradient in gradients.items():
            step.for_values[m].add_(linear(step.keys[m], gradient), alpha=factor)
            if self.key_gradients:
                step.for_keys[m].add_(linear(step.values[m], gradient.T), alpha=factor)

    def _shrink(
        self, earlier: _Step, gradients: Mapping[str, Tensor], changed: Mapping[str, Tensor], discount: float,
        retained: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Credit an earlier step with what a later one's reward means for it, whose share p of it the later one leaves.

        With s the share that was left before, s p G is the reward's part and s (p − 1) g that of the change's own cost.
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
        """(∂R/∂ũ_t, ∂R/∂ṽ_t) by module of every step t; the first is empty if it is not needed.

        What was kept to make them, dense sums above all, is let go: the accumulator is then as new.
        """
        for step in self._steps:
            self._credit(step, self._sum, 1.0)
        steps, self._steps, self._sum = self._steps, [], {}
        return [(step.for_keys, step.for_values) for step in steps]
