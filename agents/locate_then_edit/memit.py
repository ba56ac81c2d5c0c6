"""MEMIT (Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from agents.locate_then_edit.keys import subject_keys
from agents.locate_then_edit.least_squares import dense, least_squares_keys
from agents.locate_then_edit.locate import LocateAgent, LocateConfig
from agents.locate_then_edit.value_optimisation import Request, ValueConfig, Values


@dataclass(frozen=True)
class MEMITConfig(LocateConfig):
    """MEMIT's settings; see `LocateConfig`. The defaults are those published for GPT-J.

    Attributes:
        covariance_weight: λ (``mom2_update_weight``).
        recursion: whether the system contains earlier keys (SimIE, ICML 2025; RLSEdit, arXiv 2601.15686); not part of
            MEMIT.
        anchor: with ``recursion``, the weight of ‖W − W₀‖² in the system.
    """

    value: ValueConfig = field(default_factory=lambda: ValueConfig(steps=25, clamp=0.75, relative_to="state"))
    covariance_weight: float = 15_000.0
    recursion: bool = False
    anchor: float = 1.0


class MEMITAgent(LocateAgent):
    """MEMIT finds values z at the last edited layer L and spreads them over the layers. Each layer l, from the lowest
    up, writes its share of the remaining difference, R = (z − h_L) / (L − l + 1), by ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ (Eq.
    14–20; here facts are rows: ΔW = Rᵀũ, ũ = K (λC + KᵀK)⁻¹). Keys and h_L are computed again for each layer, with the
    updates of the layers below. As in the published code, a key is half the plain prompt's and half the contexts' mean,
    and h_L is the plain prompt's.

    With ``recursion`` the system is that of recursive least squares, λC + anchor·I + Σ KᵀK over this and all earlier
    batches. The updates then solve one problem for all facts so far,
    min Σ‖W k − v‖² + anchor ‖W − W₀‖² + λ tr((W − W₀) C (W − W₀)ᵀ), instead of a new one for each batch.

    In models that normalise an MLP's output before adding it (Gemma 2 and 3), the layers' shares have the scale of the
    residual stream, but the weight's output does not.

    Args:
        env, config, seed: see `LocateAgent`.
    """

    name = "memit"
    config_class: ClassVar[type[LocateConfig]] = MEMITConfig

    def solve(self, requests: Sequence[Request], values: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        dtype = self.lm.edit_dtype
        update_keys: dict[str, Tensor] = {}
        shares: dict[str, Tensor] = {}
        targets: Tensor | None = None
        for place, module in enumerate(self.modules):
            keys, hidden = subject_keys(
                self.lm, self.modules, requests, self.config.key, dense(update_keys, shares)
            )
            if targets is None:
                targets = hidden + values.delta
            shares[module] = ((targets - hidden) / (len(self.modules) - place)).to(dtype)
            update_keys[module] = self.update_keys(module, keys[module].double()).to(dtype)
        return update_keys, shares

    def update_keys(self, module: str, keys: Tensor) -> Tensor:
        """ũ (N, d_in) for keys (N, d_in), both float64; the keys are added to the memory."""
        config = self.config
        assert isinstance(config, MEMITConfig)
        system = config.covariance_weight * self.second_moment(module)
        if config.recursion:
            system += config.anchor * torch.eye(len(system), dtype=system.dtype, device=system.device)
            system += self.key_moments.get(module, 0)
            self.key_moments[module] = self.key_moments.get(module, 0) + keys.T @ keys
        return least_squares_keys(keys, system)
