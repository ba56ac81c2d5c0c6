"""PRUNE (Ma et al., "Perturbation-Restrained Sequential Model Editing", ICLR 2025), on MEMIT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.locate import dense
from agents.memit import RECOMMENDED as MEMIT_RECOMMENDED
from agents.memit import MEMITAgent, MEMITConfig

# The environment's settings that the agent is best used with.
RECOMMENDED: Mapping[str, Any] = MEMIT_RECOMMENDED


@dataclass(frozen=True)
class PRUNEConfig(MEMITConfig):
    """PRUNE's settings beside MEMIT's.

    Attributes:
        base: α of the logarithm that singular values are restrained by.
    """

    base: float = 1.2


class PRUNEAgent(MEMITAgent):
    """PRUNE: after each of MEMIT's updates, singular values σ of the accumulated ΔW = W − W₀ above σ_max, the largest
    of W₀, are restrained to log_α(σ) − log_α(σ_max) + σ_max (Eq. 8), so that the edited weight's condition number is.

    The paper restrains once, at the end of a sequence. Here the sequence has no end known to the editor, so the sum is
    restrained after every batch. The logarithm grows faster than σ itself while σ < 1 / ln α (5.5): singular values
    that it would enlarge are left as they are.

    Args:
        env, config, seed: see `LocateAgent`.
    """

    name = "prune"
    config_class = PRUNEConfig

    def __init__(self, env: Any, config: PRUNEConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        self._largest: dict[str, float] = {}

    def action(self, observation: Any, keys: dict[str, Tensor], values: dict[str, Tensor]) -> Any:
        accumulated = {}
        for module, update in dense(keys, values).items():
            original = self.lm.original_weight(module)
            if module not in self._largest:
                self._largest[module] = float(torch.linalg.matrix_norm(original, 2))
            change = self.lm.weight(module) - original + update
            accumulated[module] = restrained(change, self._largest[module], self.config.base)
        return {"accumulated": accumulated}


def restrained(change: Tensor, largest: float, base: float) -> Tensor:
    """A matrix whose singular values σ above ``largest`` are made log_base(σ / largest) + largest, if that is less."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    if values[0] <= largest:
        return change
    small = torch.minimum((values / largest).log() / math.log(base) + largest, values)
    return (left * torch.where(values > largest, small, values)) @ right
