"""PRUNE (Ma et al., "Perturbation-Restrained Sequential Model Editing", ICLR 2025), on MEMIT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.locate_then_edit.least_squares import dense
from agents.locate_then_edit.memit import MEMITAgent, MEMITConfig
from rledit_env.updates import Replacement

SUMS = ("raw", "restrained")
_PARTS = ("excess", "excess_before", "left", "found")  # see PRUNEAgent


@dataclass(frozen=True)
class PRUNEConfig(MEMITConfig):
    """PRUNE's settings beside MEMIT's.

    Attributes:
        base: α of the logarithm that restrains singular values. The published code offers e, 2, 1.5 and 1.2.
        adds_to: the sum that the next update is added to, and computed with: "raw", that of MEMIT's updates as they
            are, as published; or "restrained", the restrained copy of it. With the latter each batch restrains again
            what was restrained before, so that old edits shrink; that was this package's first way.

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
    """PRUNE restrains the sum of MEMIT's updates: of its singular values σ, those above σ_max, the largest of W₀,
    become log_α(σ) − log_α(σ_max) + σ_max (Eq. 8). That bounds the condition number of the edited weight.

    As published, edits are made one after the other without restraint, and a copy of their sum is restrained once at
    the end. Here the end is not known. So the LLM gets W₀ plus a restrained copy of the raw sum after every batch, and
    the next batch is edited with W₀ plus the raw sum in its place. After each batch the LLM is then what the published
    code gives for the stream up to there.

    Ours: the logarithm grows faster than σ itself while σ < 1 / ln α (5.5). Singular values that it would enlarge stay
    as they are.

    The agent remembers the excess, the part of the raw sum that the restraint took off: raw sum = W − W₀ + excess. With
    it go checksums of the weights, since it is only right for these (see :meth:`excess`): for those that the last
    update made; if the environment took that update back, the excess before it counts; if anything else changed the
    LLM, there is none, and the raw sum starts with W − W₀.

    Args:
        env, config, seed: see `LocateAgent`.
    """

    name = "prune"
    config_class = PRUNEConfig

    def __init__(self, env: Any, config: PRUNEConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        self._largest: dict[str, float] = {}
        # By module: the excess after the last update and before it; checksums of the weights after it ("left") and
        # before it ("found").
        self._parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}

    def reset(self) -> None:
        super().reset()
        self._parts = {part: {} for part in _PARTS}

    def memory(self) -> dict[str, Tensor]:
        """The keys' second moments, if any, and the parts that give the raw sum, named "PART:MODULE"."""
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
        """The raw sum minus W − W₀, (d_out, d_in) by module, for the LLM's present weights; empty where there is
        none."""
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
        """{"accumulated": restrained copy of the raw sum, MEMIT's update included}; the LLM now holds the raw sum."""
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
        for module, weight in Replacement(accumulated).updated(weights, weights).items():
            left[module] = checksum(weight)
        self._parts |= {"excess": excess, "left": left}
        return {"accumulated": accumulated}

    @classmethod
    def of_first_format(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().of_first_format(settings), "adds_to": "restrained"}

    def _checksums(self) -> dict[str, Tensor]:
        return {m: checksum(self.lm.weight(m)) for m in self.modules}


def checksum(weight: Tensor) -> Tensor:
    """An int64 checksum of the bits of each row of a weight (d_out, d_in); the same on every device."""
    bits = torch.int64 if weight.dtype == torch.float64 else torch.int32
    return weight.contiguous().view(bits).sum(1, dtype=torch.int64)


def restrained(change: Tensor, largest: float, base: float) -> Tensor:
    """The matrix with log_base(σ / largest) + largest for each singular value σ above ``largest``, if that is less."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    if values[0] <= largest:
        return change
    small = torch.minimum((values / largest).log() / math.log(base) + largest, values)
    return (left * torch.where(values > largest, small, values)) @ right
