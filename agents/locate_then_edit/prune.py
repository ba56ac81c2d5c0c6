"""PRUNE (Ma et al., "Perturbation-Restrained Sequential Model Editing", ICLR 2025), on MEMIT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.locate_then_edit.least_squares import dense
from agents.locate_then_edit.memit import MEMITAgent, MEMITConfig
from rledit_env.interface import Environment
from rledit_env.spaces import Action, Observation
from rledit_env.type_aliases import JsonObject
from rledit_env.updates import Replacement

SUMS = ("raw", "restrained")
_PARTS = ("excess", "excess_before", "left", "found")  # see PRUNEAgent.__init__


@dataclass(frozen=True)
class PRUNEConfig(MEMITConfig):
    """PRUNE's settings; see `MEMITConfig`.

    Attributes:
        base: α of the logarithm that restrains singular values. The published code offers e, 2, 1.5 and 1.2.
        adds_to: the sum that the next update is computed with and added to: "raw", the plain sum of MEMIT's updates, as
            published; or "restrained", its restrained copy. With "restrained" each batch restrains the earlier edits
            again, so that they shrink; this package's first version did so.

    Raises:
        ValueError: a value is out of range.
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
    """PRUNE restrains the sum of MEMIT's updates: its singular values σ above σ_max, the largest of W₀, become
    log_α(σ) − log_α(σ_max) + σ_max (Eq. 8). This bounds the condition number of the edited weight.

    The published code makes all edits without restraint, and restrains a copy of their sum once at the end. Here the
    end is not known. So the LLM gets W₀ plus a restrained copy of the raw sum after every batch, and the next batch is
    edited with W₀ plus the raw sum. After each batch the LLM then equals the published code's result for the stream so
    far.

    Ours: the logarithm grows faster than σ itself while σ < 1 / ln α (5.5). Singular values that it would enlarge are
    left as they are.

    The agent remembers the excess, the difference between the raw sum and its restrained copy:
    raw sum = W − W₀ + excess. It is valid only for certain weights, which the agent recognises by checksums (see
    :meth:`excess`). After the last update, it is the last excess; if the environment took that update back, the excess
    before it; if anything else changed the LLM, there is none, and the raw sum starts with W − W₀.

    Args:
        env, config, seed: see `LocateAgent`.
    """

    name = "prune"
    config_class = PRUNEConfig
    config: PRUNEConfig

    def __init__(self, env: Environment, config: PRUNEConfig | None = None, seed: int = 0) -> None:
        super().__init__(env, config, seed)
        self._largest: dict[str, float] = {}  # module → σ_max
        # By module: the excess after and before the last update; checksums of the weights after ("left") and before
        # ("found") it.
        self._parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}

    def reset(self) -> None:
        super().reset()
        self._parts = {part: {} for part in _PARTS}

    def memory(self) -> dict[str, Tensor]:
        """The keys' second moments, if any, and the parts that give the raw sum, named "PART:MODULE"."""
        parts = {f"{part}:{m}": tensor for part, by in self._parts.items() for m, tensor in by.items()}
        return {**super().memory(), **parts}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`memory`."""
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
        """The raw sum minus W − W₀, (d_out, d_in) by module, for the LLM's present weights; empty if none is known."""
        present = self._checksums()
        for checksums, excess in (("left", "excess"), ("found", "excess_before")):
            known = self._parts[checksums]
            if known and all(torch.equal(present[m], known[m]) for m in known):
                return self._parts[excess]
        return {}

    def predict(self, observation: Observation, deterministic: bool = True) -> tuple[Action, None]:
        excess = self.excess()
        parts = {"found": self._checksums(), "excess_before": excess}
        with self.lm.preserved() if excess else nullcontext():
            if excess:
                self.lm.add(excess)
            action, state = super().predict(observation, deterministic)
        self._parts |= parts
        return action, state

    def action(self, observation: Observation, keys: dict[str, Tensor], values: dict[str, Tensor]) -> Action:
        """{"accumulated": the restrained copy of the raw sum with MEMIT's update}; :meth:`predict` calls it while the
        LLM's weights are W₀ plus the raw sum."""
        accumulated, excess, checksums = {}, {}, {}
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
            checksums[module] = checksum(weight)
        self._parts |= {"excess": excess, "left": checksums}
        return {"accumulated": accumulated}

    @classmethod
    def of_first_format(cls, settings: JsonObject) -> JsonObject:
        return {**super().of_first_format(settings), "adds_to": "restrained"}

    def _checksums(self) -> dict[str, Tensor]:
        return {m: checksum(self.lm.weight(m)) for m in self.modules}


def checksum(weight: Tensor) -> Tensor:
    """An int64 checksum of the bits of each row of a weight (d_out, d_in); the same on every device."""
    bits = torch.int64 if weight.dtype == torch.float64 else torch.int32
    return weight.contiguous().view(bits).sum(1, dtype=torch.int64)


def restrained(change: Tensor, largest: float, base: float) -> Tensor:
    """The matrix with each singular value σ above ``largest`` replaced by log_base(σ / largest) + largest, if that is
    less."""
    decomposed: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(change, full_matrices=False)
    left, values, right = decomposed
    if values[0] <= largest:
        return change
    small = torch.minimum((values / largest).log() / math.log(base) + largest, values)
    return (left * torch.where(values > largest, small, values)) @ right
