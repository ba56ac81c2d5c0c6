"""PRUNE (Ma et al., "Perturbation-Restrained Sequential Model Editing", ICLR 2025), on MEMIT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from agents.locate_then_edit.least_squares import dense
from agents.locate_then_edit.memit import MEMITAgent, MEMITConfig
from rledit_env.ledger import updated

SUMS = ("raw", "restrained")
_PARTS = ("excess", "excess_before", "left", "found")  # of PRUNEAgent's memory


@dataclass(frozen=True)
class PRUNEConfig(MEMITConfig):
    """PRUNE's settings beside MEMIT's.

    Attributes:
        base: α of the logarithm that singular values are restrained by. The published code offers e, 2, 1.5 and 1.2.
        adds_to: the sum that the next update is computed on and added to: "raw", that of MEMIT's updates as they are,
            as published, or "restrained", the copy that was made of it. With the latter each batch restrains again
            what was restrained before, so that old edits shrink; it is what this package did before.

    Raises:
        ValueError: a value is out of its range.
    """

    base: float = 1.2
    adds_to: Literal["raw", "restrained"] = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adds_to not in SUMS:
            raise ValueError(f"adds_to is {self.adds_to!r}; give 'raw', as published, or 'restrained'")
        if not self.base > 1:
            raise ValueError(f"base is {self.base}; give a number above 1")


class PRUNEAgent(MEMITAgent):
    """PRUNE: singular values σ of the sum of MEMIT's updates above σ_max, the largest of W₀, are restrained to
    log_α(σ) − log_α(σ_max) + σ_max (Eq. 8), so that the edited weight's condition number is.

    As published, edits are made one after the other without restraint, and a copy of their sum is restrained once at
    the end. Here the end is not known: after every batch the LLM gets W₀ plus the restrained copy of the raw sum so
    far, and the next batch is edited in the LLM with the raw sum. So the LLM is after each batch what the published
    code gives for the stream up to there.

    Ours: the logarithm grows faster than σ itself while σ < 1 / ln α (5.5), and singular values that it would enlarge
    are left as they are.

    The raw sum is W − W₀ + excess, where the excess is what the restraint has taken off; it is kept (see
    :meth:`memory`) with a checksum of the weights. Where the environment took the last update back, the excess is that
    of before; where the LLM was changed by something else, the sum begins with what the LLM then holds.

    Args:
        env, config, seed: see `LocateAgent`.
    """

    name = "prune"
    config_class = PRUNEConfig

    def __init__(self, env: gym.Env[Any, Any], config: PRUNEConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        self._largest: dict[str, float] = {}
        # By module: what the last restraint took off, and the one before; checksums of the weights as the last update
        # leaves them, and as it found them.
        self._parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}

    def reset(self) -> None:
        super().reset()
        self._parts = {part: {} for part in _PARTS}

    def memory(self) -> dict[str, Tensor]:
        """The keys' second moments, if any, and what the raw sum is found from: module by module, as "PART:MODULE"."""
        parts = {f"{part}:{m}": tensor for part, by in self._parts.items() for m, tensor in by.items()}
        return {**super().memory(), **parts}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Take the tensors of :meth:`memory`."""
        moments, parts = {}, {part: dict[str, Tensor]() for part in _PARTS}
        for name, tensor in memory.items():
            part, _, module = name.partition(":")
            if part in parts:
                parts[part][module] = tensor.to(self.lm.device)
            else:
                moments[name] = tensor
        super().load_memory(moments)
        self._parts = parts

    def excess(self) -> dict[str, Tensor]:
        """Raw sum less W − W₀, (d_out, d_in) by module, in the LLM as it is now; no module where it is zero."""
        now = self._checksums()
        for checksums, excess in (("left", "excess"), ("found", "excess_before")):
            known = self._parts[checksums]
            if known and all(torch.equal(now[m], known[m]) for m in known):
                return self._parts[excess]
        return {}

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        excess = self.excess()
        parts = {"found": self._checksums(), "excess_before": excess}
        with self.lm.preserved() if excess else nullcontext():
            if excess:
                self.lm.add(excess)
            action, state = super().predict(observation, deterministic)
        self._parts |= parts
        return action, state

    def action(self, observation: Any, keys: dict[str, Tensor], values: dict[str, Tensor]) -> Any:
        """{"accumulated": restrained copy of the raw sum with MEMIT's update}, where the LLM holds the raw sum."""
        accumulated, excess, left = {}, {}, {}
        for module, update in dense(keys, values).items():
            original = self.lm.original_weight(module)
            if module not in self._largest:
                self._largest[module] = float(torch.linalg.matrix_norm(original, 2))
            raw = self.lm.weight(module) - original + update
            accumulated[module] = restrained(raw, self._largest[module], self.config.base)
            if self.config.adds_to == "raw" and accumulated[module] is not raw:
                excess[module] = raw - accumulated[module]
        weights = {m: self.lm.original_weight(m) for m in accumulated}
        for module, weight in updated(weights, weights, {"accumulated": accumulated}).items():
            left[module] = checksum(weight)
        self._parts |= {"excess": excess, "left": left}
        return {"accumulated": accumulated}

    @classmethod
    def of_first_format(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().of_first_format(settings), "adds_to": "restrained"}

    def _checksums(self) -> dict[str, Tensor]:
        return {m: checksum(self.lm.weight(m)) for m in self.modules}


def checksum(weight: Tensor) -> Tensor:
    """A number of int64 for each row of a weight (d_out, d_in), from the row's bits; exact on every device."""
    bits = torch.int64 if weight.dtype == torch.float64 else torch.int32
    return weight.contiguous().view(bits).sum(1, dtype=torch.int64)


def restrained(change: Tensor, largest: float, base: float) -> Tensor:
    """A matrix whose singular values σ above ``largest`` are made log_base(σ / largest) + largest, if that is less."""
    decomposed: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(change, full_matrices=False)
    left, values, right = decomposed
    if values[0] <= largest:
        return change
    small = torch.minimum((values / largest).log() / math.log(base) + largest, values)
    return (left * torch.where(values > largest, small, values)) @ right
