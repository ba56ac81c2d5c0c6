"""Fine-tuning: no edit, the plain gradient, FT-L, FT-M and CrispEdit."""

from agents.fine_tuning.baselines import FineTuningAgent, FineTuningConfig, NoEditAgent
from agents.fine_tuning.crispedit import CrispEditAgent, CrispEditConfig
from agents.fine_tuning.ft_l import FTLAgent, FTLConfig, FTMAgent, FTMConfig

__all__ = [
    "CrispEditAgent",
    "CrispEditConfig",
    "FTLAgent",
    "FTLConfig",
    "FTMAgent",
    "FTMConfig",
    "FineTuningAgent",
    "FineTuningConfig",
    "NoEditAgent",
]
