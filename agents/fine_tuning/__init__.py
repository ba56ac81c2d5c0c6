"""Baselines: no edit, the plain gradient, FT-L and FT-M."""

from agents.fine_tuning.baselines import FineTuningAgent, FineTuningConfig, NoEditAgent
from agents.fine_tuning.ft_l import FTLAgent, FTLConfig, FTMAgent, FTMConfig

__all__ = [
    "FTLAgent",
    "FTLConfig",
    "FTMAgent",
    "FTMConfig",
    "FineTuningAgent",
    "FineTuningConfig",
    "NoEditAgent",
]
