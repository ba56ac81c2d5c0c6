"""How far a run of training has come, and the running mean of its policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Progress:
    """What of a run is neither the policy's, nor its optimiser's, nor counted by the agent.

    Attributes:
        begun: the agent's timesteps at the start of the run.
        finished: whether the run has ended.
        best: the policy with the best score, as `HypernetworkPolicy.policy_state` gives it.
        waited: evaluations since then.
        evaluated: the update that was evaluated last.
        mean: of the parameters over the updates, by name; empty where there is none.
        mean_updates: how many updates it has seen.
    """

    begun: int = 0
    finished: bool = False
    best: dict[str, Tensor] | None = None
    waited: int = 0
    evaluated: int | None = None
    mean: dict[str, Tensor] = field(default_factory=dict)
    mean_updates: int = 0

    def take_into_mean(self, network: nn.Module, decay: float) -> None:
        """Let the running mean follow a network's parameters, the faster the fewer updates it has seen.

        Args:
            network: whose parameters.
            decay: of the mean, once it has seen many; 0 keeps none.
        """
        if not decay:
            return
        count = self.mean_updates = self.mean_updates + 1 if self.mean else 1
        decay = min(decay, (count - 1) / count)
        for name, parameter in network.named_parameters():
            mean = self.mean.setdefault(name, parameter.detach().clone())
            mean.lerp_(parameter.detach(), 1 - decay)

    def with_mean(self, policy: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A policy's tensors, with the running mean of the parameters where there is one."""
        return {**policy, **{f"network.{name}": mean for name, mean in self.mean.items()}}
