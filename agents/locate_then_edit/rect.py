"""RECT (Gu et al., "Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue",
EMNLP 2024), on MEMIT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.locate_then_edit.least_squares import dense
from agents.locate_then_edit.memit import MEMITAgent, MEMITConfig
from rledit_env.spaces import Action, Observation


@dataclass(frozen=True)
class RECTConfig(MEMITConfig):
    """RECT's settings; see `MEMITConfig`.

    Attributes:
        kept: share of an update's entries that is kept.

    Raises:
        ValueError: a value is out of range.
    """

    kept: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.kept <= 1:
            raise ValueError(f"kept is {self.kept}; give a share above 0, at most 1")


class RECTAgent(MEMITAgent):
    """RECT keeps only the entries of MEMIT's updates with the largest relative change |ΔW / W| (section 5), and sets
    the others to zero. As in the code published with AlphaEdit, MEMIT's updates are computed layer by layer, and masked
    at the end. That code divides by W + 1e-8 and keeps one entry more; ours divides by W itself.

    Args:
        env, config, seed: see `LocateAgent`.
    """

    name = "rect"
    config_class = RECTConfig
    config: RECTConfig

    def action(self, observation: Observation, keys: dict[str, Tensor], values: dict[str, Tensor]) -> Action:
        return {
            "updates": {
                module: largest_changes(update, self.lm.weight(module), self.config.kept)
                for module, update in dense(keys, values).items()
            }
        }


def largest_changes(update: Tensor, weight: Tensor, kept: float) -> Tensor:
    """ΔW with the share ``kept`` of its entries that have the largest |ΔW / W|; the others are zero."""
    relative = (update / weight).abs().nan_to_num(nan=0.0)  # 0 / 0 is no change
    count = round(kept * relative.numel())
    largest = relative.flatten().topk(count, sorted=False).indices
    mask = torch.zeros(relative.numel(), dtype=torch.bool, device=update.device)
    mask[largest] = True
    return update * mask.view_as(update)
