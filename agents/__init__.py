"""Editors as agents of the environment."""

from agents.base import Agent, NotApplicable
from agents.baselines import FineTuningAgent, FineTuningConfig, NoEditAgent
from agents.editing import EditLog, edit_facts, edit_stream
from agents.hypernetwork import Hypernetwork, HypernetworkConfig
from agents.ppo import StandardAgent, StandardConfig
from agents.random_search import RandomSearchAgent
from agents.rledit import RLEditAgent, RLEditConfig
from agents.saved import agent_settings, find_agent, load_agent
from agents.vec_env import StreamsVecEnv

__all__ = [
    "Agent",
    "EditLog",
    "FineTuningAgent",
    "FineTuningConfig",
    "Hypernetwork",
    "HypernetworkConfig",
    "NoEditAgent",
    "NotApplicable",
    "RLEditAgent",
    "RLEditConfig",
    "RandomSearchAgent",
    "StandardAgent",
    "StandardConfig",
    "StreamsVecEnv",
    "agent_settings",
    "edit_facts",
    "edit_stream",
    "find_agent",
    "load_agent",
]
