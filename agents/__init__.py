"""Editors as agents of the environment."""

from agents.alphaedit import AlphaEditAgent, AlphaEditConfig
from agents.base import Agent, NotApplicable
from agents.baselines import FineTuningAgent, FineTuningConfig, NoEditAgent
from agents.dafnet import DAFNetAgent, DAFNetConfig, DAFNetNetworkConfig
from agents.editing import EditLog, edit_facts, edit_stream
from agents.ft_l import FTLAgent, FTLConfig, FTMAgent, FTMConfig
from agents.hypernetwork import Hypernetwork, HypernetworkConfig
from agents.key_statistics import KeyStatistics
from agents.malmen import MALMENAgent, MALMENConfig, malmen_network, malmen_rledit
from agents.memit import MEMITAgent, MEMITConfig
from agents.mend import MENDAgent, MENDConfig, mend_network, mend_rledit
from agents.ppo import StandardAgent, StandardConfig
from agents.prune import PRUNEAgent, PRUNEConfig
from agents.random_search import RandomSearchAgent
from agents.rect import RECTAgent, RECTConfig
from agents.rledit import RLEditAgent, RLEditConfig, rledit_paper, rledit_paper_network, rledit_ridge, rledit_untrained
from agents.rome import ROMEAgent, ROMEConfig
from agents.saved import agent_settings, find_agent, load_agent
from agents.ultraedit import UltraEditAgent, UltraEditConfig
from agents.value_optimisation import ValueConfig
from agents.vec_env import StreamsVecEnv

__all__ = [
    "Agent",
    "AlphaEditAgent",
    "AlphaEditConfig",
    "DAFNetAgent",
    "DAFNetConfig",
    "DAFNetNetworkConfig",
    "EditLog",
    "FTLAgent",
    "FTLConfig",
    "FTMAgent",
    "FTMConfig",
    "FineTuningAgent",
    "FineTuningConfig",
    "Hypernetwork",
    "HypernetworkConfig",
    "KeyStatistics",
    "MALMENAgent",
    "MALMENConfig",
    "MEMITAgent",
    "MEMITConfig",
    "MENDAgent",
    "MENDConfig",
    "NoEditAgent",
    "NotApplicable",
    "PRUNEAgent",
    "PRUNEConfig",
    "RECTAgent",
    "RECTConfig",
    "RLEditAgent",
    "RLEditConfig",
    "ROMEAgent",
    "ROMEConfig",
    "RandomSearchAgent",
    "StandardAgent",
    "StandardConfig",
    "StreamsVecEnv",
    "UltraEditAgent",
    "UltraEditConfig",
    "ValueConfig",
    "agent_settings",
    "edit_facts",
    "edit_stream",
    "find_agent",
    "load_agent",
    "malmen_network",
    "malmen_rledit",
    "mend_network",
    "mend_rledit",
    "rledit_paper",
    "rledit_paper_network",
    "rledit_ridge",
    "rledit_untrained",
]
