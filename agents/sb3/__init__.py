"""Stable-Baselines3's algorithms on the low-dimensional view, and random search as their baseline."""

from agents.sb3.agent import StandardAgent
from agents.sb3.config import StandardConfig
from agents.sb3.random_search import RandomSearchAgent
from agents.sb3.vec_env import StreamsVecEnv

__all__ = [
    "RandomSearchAgent",
    "StandardAgent",
    "StandardConfig",
    "StreamsVecEnv",
]
