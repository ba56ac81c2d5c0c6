"""RLEdit: the agent that learns from whole episodes, its hypernetwork and its configuration."""

from agents.rledit.agent import RLEditAgent
from agents.rledit.config import (
    RECOMMENDED,
    HypernetworkConfig,
    RLEditConfig,
    rledit_paper,
    rledit_paper_network,
    rledit_ridge,
    rledit_untrained,
)
from agents.rledit.distributed import Processes
from agents.rledit.hypernetwork import Hypernetwork
from agents.rledit.moments import MissingMomentsWarning

__all__ = [
    "Hypernetwork",
    "HypernetworkConfig",
    "MissingMomentsWarning",
    "Processes",
    "RECOMMENDED",
    "RLEditAgent",
    "RLEditConfig",
    "rledit_paper",
    "rledit_paper_network",
    "rledit_ridge",
    "rledit_untrained",
]
