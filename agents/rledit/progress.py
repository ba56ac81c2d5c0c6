"""The progress of a training run, and the running mean of its policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Progress:
    """The state of a training run beside the policy, the optimiser and the agent's counters.

    Attributes:
        begun: the agent's timesteps at the start of the run.
        finished: whether the run has ended.
        best: the policy with the best score, from `HypernetworkPolicy.policy_state`.
        waited: evaluations since the best one.
        evaluated: the update that was evaluated last.
        mean: running mean of the parameters over the updates, by name; empty if none is kept.
        mean_updates: the number of updates in the mean.
    """

    begun: int = 0
    finished: bool = False
    best: dict[str, Tensor] | None = None
    waited: int = 0
    evaluated: int | None = None
    mean: dict[str, Tensor] = field(default_factory=dict)
    mean_updates: int = 0

    def take_into_mean(self, network: nn.Module, decay: float) -> None:
        """Add a network's parameters to the running mean, with a smaller decay for the first updates.

        Args:
            network: the network.
            decay: of the mean after many updates; 0 keeps no mean.
        """
        if not decay:
            return
        count = self.mean_updates = self.mean_updates + 1 if self.mean else 1
        decay = min(decay, (count - 1) / count)
        for name, parameter in network.named_parameters():
            mean = self.mean.setdefault(name, parameter.detach().clone())
            mean.lerp_(parameter.detach(), 1 - decay)

    def with_mean(self, policy: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A policy's tensors, with the running mean in place of the parameters if there is one."""
        return {**policy, **{f"network.{name}": mean for name, mean in self.mean.items()}}
