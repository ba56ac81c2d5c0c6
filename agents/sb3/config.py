"""The configuration of a standard algorithm: its view of the environment and its hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm

from rledit_env.type_aliases import Settings
from rledit_env.wrappers import Rule, Share

ALGORITHMS: Mapping[str, type[BaseAlgorithm]] = {"ppo": PPO, "a2c": A2C, "sac": SAC, "td3": TD3}
SMALL_NETWORK: Settings = {"net_arch": [32]}
# For trainings of some hundred steps, each a fraction of a second: small networks, and many updates on small rollouts.
HYPERPARAMETERS: Mapping[str, Settings] = {
    "ppo": {
        "n_steps": 80, "batch_size": 40, "n_epochs": 10, "learning_rate": 3e-3, "gamma": 1.0, "gae_lambda": 0.95,
        "policy_kwargs": {**SMALL_NETWORK, "log_std_init": -1.0},
    },
    "a2c": {
        "n_steps": 20, "learning_rate": 3e-3, "gamma": 1.0, "gae_lambda": 0.95, "normalize_advantage": True,
        "policy_kwargs": {**SMALL_NETWORK, "log_std_init": -1.0},
    },
    "sac": {"learning_starts": 40, "batch_size": 64, "learning_rate": 1e-3, "gamma": 0.99, "buffer_size": 100_000},
    "td3": {"learning_starts": 40, "batch_size": 64, "learning_rate": 1e-3, "gamma": 0.99, "buffer_size": 100_000},
}  # fmt: skip
MAX_SIZE = 10**7  # the largest buffer, or other number, that a saved agent's file may ask for


@dataclass(frozen=True)
class StandardConfig:
    """A standard algorithm's view of the environment, and its hyperparameters.

    Attributes:
        algorithm: the algorithm of Stable-Baselines3.
        rule: the base rule that the actions scale (see `rledit_env.wrappers.ScaledUpdate`).
        step_size, damping, span, rank, share: as in `rledit_env.wrappers.ScaledUpdate`; the features have the same
            ``share``.
        baseline_streams: training repeats this many episodes, and each step's reward is relative to the zero action's
            (see `rledit_env.wrappers.RelativeReward`). Features are standardised with those of the zero action in these
            episodes. 0: new episodes, plain rewards and plain features.
        reward_scale: factor of the algorithm's rewards, since its value function learns best near 1; logged returns are
            the environment's own.
        kl_bound: a bound on the divergence of the best policy (see `RLEditConfig.kl_bound`).
        hyperparameters: of the algorithm; they override :data:`HYPERPARAMETERS`.
    """

    algorithm: Literal["ppo", "a2c", "sac", "td3"] = "ppo"
    rule: Rule = "least_squares"
    step_size: float = 1.0
    damping: float = 1.0
    span: float = 10.0
    rank: int = 0
    share: Share = "all"
    baseline_streams: int = 32
    reward_scale: float = 1.0
    kl_bound: float | None = None
    hyperparameters: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm!r}; give one of {', '.join(ALGORITHMS)}")
        if self.kl_bound is not None and not self.kl_bound > 0:
            raise ValueError(f"kl_bound is {self.kl_bound}; give a positive number of nats, or None for no bound")


def standard_config(saved: Settings, most: int = MAX_SIZE) -> StandardConfig:
    """The configuration in an agent's file.

    Raises:
        ValueError: a hyperparameter is not a number or a list of numbers, is larger than :data:`MAX_SIZE` (or, in
            ``policy_kwargs``, than ``most``), or is not allowed in a file, such as a path to write to.
    """

    def check(name: str, value: object, largest: int) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                check(f"{name}.{key}", inner, largest)
        elif isinstance(value, list):
            for inner in value:
                check(name, inner, largest)
        elif value is not None and (not isinstance(value, int | float) or not -largest <= value <= largest):
            raise ValueError(f"{name} is {value!r}; it must be a number up to {largest:,}")

    hyperparameters = saved["hyperparameters"]
    if forbidden := set(hyperparameters) & {"tensorboard_log", "verbose", "device", "env", "policy"}:
        raise ValueError(f"the hyperparameter {min(forbidden)!r} is not a saved agent's to set")
    for name, value in hyperparameters.items():
        check(name, value, most if name == "policy_kwargs" else MAX_SIZE)
    for name in ("rank", "baseline_streams"):
        check(name, saved[name], MAX_SIZE)
    return StandardConfig(**saved)
