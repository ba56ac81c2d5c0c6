"""Editors as agents of the environment."""

from agents.base import Agent
from agents.hypernetwork import Hypernetwork, HypernetworkConfig
from agents.rledit import RLEditAgent, RLEditConfig

__all__ = ["Agent", "Hypernetwork", "HypernetworkConfig", "RLEditAgent", "RLEditConfig"]
