"""Editors as agents of the environment."""

from agents.alphaedit import AlphaEditAgent, AlphaEditConfig
from agents.base import Agent, NotApplicable
from agents.editing import EditLog, edit_facts, edit_stream
from agents.hypernetwork import Hypernetwork, HypernetworkConfig
from agents.key_statistics import KeyStatistics
from agents.memit import MEMITAgent, MEMITConfig
from agents.ppo import StandardAgent, StandardConfig
from agents.prune import PRUNEAgent, PRUNEConfig
from agents.random_search import RandomSearchAgent
from agents.rect import RECTAgent, RECTConfig
from agents.rledit import RLEditAgent, RLEditConfig
from agents.rome import ROMEAgent, ROMEConfig
from agents.saved import agent_settings, find_agent, load_agent
from agents.value_optimisation import ValueConfig
from agents.vec_env import StreamsVecEnv

__all__ = [
    "Agent",
    "AlphaEditAgent",
    "AlphaEditConfig",
    "EditLog",
    "Hypernetwork",
    "HypernetworkConfig",
    "KeyStatistics",
    "MEMITAgent",
    "MEMITConfig",
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
    "ValueConfig",
    "agent_settings",
    "edit_facts",
    "edit_stream",
    "find_agent",
    "load_agent",
]
