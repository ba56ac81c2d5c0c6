"""The first layer of every policy: standardised features."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor


class Standardised(BaseFeaturesExtractor):
    """Features minus their mean, divided by their standard deviation, clipped to ±5; part of the policy, and saved with
    it."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, observation_space.shape[0])
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.zeros(self.features_dim))
        self.register_buffer("std", torch.ones(self.features_dim))

    def fit(self, observations: np.ndarray) -> None:
        """Set mean and deviation (F,) from observations (n, F); features that never change become 0."""
        features = torch.as_tensor(observations, dtype=torch.float32)
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0).clamp(min=1e-3))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return ((observations - self.mean) / self.std).clamp(-5.0, 5.0)
